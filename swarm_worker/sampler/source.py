"""Where a sampler's rollouts come from: a model that generates and is rewarded, or a recording. No stream, no order of work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from codec.basis import Basis
from codec.link_codec import LinkCodec
from codec.spec import Direction
from swarm_core.data.dataset import Row, load_rows
from swarm_core.learning.rollout import RolloutBatch
from swarm_core.manifest import Manifest
from swarm_core.models.architecture import resolve
from swarm_core.models.reading import load_tokenizer
from swarm_core.wire.messages import BasisSet, Order
from swarm_worker.device import pick_device
from swarm_worker.entry import Entry
from swarm_worker.membership import read_bases
from swarm_worker.sampler.collect import Collected, Collector, SamplingSpec
from swarm_worker.sampler.engine import Projection
from swarm_worker.sampler.errors import SamplerError
from swarm_worker.sampler.evaluate import Evaluation, EvaluationSpec, evaluate
from swarm_worker.sampler.replay import read_rollouts
from swarm_worker.sampler.verify import VerifierPool

SAMPLES_SHOWN = 4  # completions of each batch that are kept as text, for people to read


@dataclass(frozen=True)
class SamplerArguments:
    """The command line of `swarm_worker sample`; what is None comes from the manifest."""

    anchor: str
    engine: str | None = None
    replay: Path | None = None
    out: Path = Path("runs/sampler")
    model: str | None = None
    wait_s: float = 60.0
    entry: Entry = field(default_factory=Entry)
    health_port: int | None = None


class Source:
    """Where rollouts come from: a model that generates, or a recording."""

    def __init__(self, manifest: Manifest, arguments: SamplerArguments) -> None:
        config = manifest.config
        self.manifest = manifest
        engine = arguments.engine or config.sampler.engine
        recording = arguments.replay or config.sampler.replay
        self.replaying = engine == "replay"
        if arguments.replay is not None and not self.replaying:
            raise SamplerError(
                f"--replay {arguments.replay} is given, but the engine is {engine}, which reads no recording: "
                "add --engine replay, or leave --replay out"
            )
        self.model_path = resolve(arguments.model or config.model.path)
        self._recorded: Iterator[RolloutBatch] | None = None
        self._at = 0
        self._bases: dict[tuple[int, Direction], Basis] = {}
        self.basis_version = 0
        self.validation: list[Row] = []
        self._samples = (arguments.out / "samples.jsonl").open("a")
        if self.replaying:
            if recording is None:
                raise SamplerError("engine replay needs recorded rollouts: give --replay FILE or set sampler.replay")
            self._recorded = read_rollouts(
                recording, config.grpo.completions_per_prompt, groups=config.grpo.prompts_per_batch
            )
            return
        device = pick_device(config.run.device)
        dtype = torch.bfloat16 if device.type == "cuda" and config.run.precision in ("auto", "bf16") else torch.float32
        from swarm_worker.sampler.hf import HfEngine  # two seconds of imports, which a recording has no use for

        self.engine = HfEngine(
            self.model_path, device=device, dtype=dtype, sequences_per_call=config.sampler.batch_size
        )
        self.tokenizer = load_tokenizer(self.model_path)
        self.verifier = VerifierPool(config.data.reward, processes=1, limit_s=config.data.verifier_timeout_s)
        spec = SamplingSpec(
            prompts=config.grpo.prompts_per_batch,
            group_size=config.grpo.completions_per_prompt,
            temperature=config.grpo.temperature,
            max_new_tokens=config.grpo.max_completion_length,
            seed=config.run.seed,
            chat_template=config.data.chat_template,
        )
        self.collector = Collector(self.engine, self.tokenizer, load_rows(config.data.train), self.verifier, spec)
        if config.data.validation is not None:
            self.validation = load_rows(config.data.validation)[: config.sampler.eval_prompts]

    @property
    def version(self) -> int:
        return 0 if self.replaying else self.engine.version

    @property
    def can_evaluate(self) -> bool:
        return not self.replaying and bool(self.validation)

    def load_weights(self, state: dict[str, Tensor], version: int) -> None:
        self.engine.load_weights(state, version)

    def hold_bases(self, message: BasisSet) -> None:
        """The newest bases, for the evaluation of the compressed pipeline."""
        self._bases = read_bases(message, self.manifest)
        self.basis_version = message.version

    def collect(self, order: Order) -> Collected | None:
        """The batch of an order; None when a recording is used up."""
        if self._recorded is None:
            collected = self.collector.collect(order.batch)
            self._show(order, collected)
            return collected
        rollouts = next(islice(self._recorded, order.batch - self._at, None), None)
        if rollouts is None:
            return None
        self._at = order.batch + 1
        # A recording's own weight versions say nothing about this run's: its rollouts are taken as fresh.
        rollouts = replace(rollouts, batch=order.batch, weight_version=order.weight_version)
        return Collected(rollouts, {}, [])

    def evaluate(self) -> tuple[Evaluation, Evaluation | None]:
        """(accuracy of the uncompressed weights, accuracy of the compressed pipeline if links are lossy)."""
        config = self.manifest.config
        spec = EvaluationSpec(
            temperature=config.grpo.temperature,
            max_new_tokens=config.grpo.max_completion_length,
            seed=config.run.seed + 1,
            samples_per_prompt=config.sampler.eval_samples,
            chat_template=config.data.chat_template,
        )
        plain = evaluate(self.engine, self.tokenizer, self.validation, self.verifier, spec)
        projections = self._projections()
        if not projections:
            return plain, None
        compressed = evaluate(
            self.engine, self.tokenizer, self.validation, self.verifier, spec, projections=projections
        )
        return plain, compressed

    def _projections(self) -> dict[int, Projection]:
        """What each boundary does to the hidden rows, by the layer it stands before."""
        link = self.manifest.link()
        if link.kind == "identity":
            return {}
        codec = LinkCodec(link)

        def through(boundary: int) -> Projection:
            basis = self._bases.get((boundary, Direction.FORWARD))
            return lambda h_NH: codec.project(h_NH, Direction.FORWARD, basis)

        return {span.last_layer: through(span.stage) for span in self.manifest.spans[:-1]}

    def _show(self, order: Order, collected: Collected) -> None:
        for sample in collected.samples[:SAMPLES_SHOWN]:
            line = {
                "batch": order.batch,
                "weight_version": order.weight_version,
                "prompt": sample.prompt,
                "completion": sample.completion,
                "answer": sample.answer,
                "reward": sample.verdict.reward,
            }
            self._samples.write(json.dumps(line) + "\n")
        self._samples.flush()

    def close(self) -> None:
        self._samples.close()
        if not self.replaying:
            self.verifier.close()
