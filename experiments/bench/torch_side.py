"""The same two stages under torch.distributed.pipelining: gloo, 1F1B, one process a stage. Knows nothing of the swarm.

    python -m experiments.bench.torch_side --rank 0 --config run.toml --rollouts rollouts.jsonl --rendezvous FILE

Layers, loss, optimizer and clipping are the project's own, so that only the machinery between the stages differs. The
process says "ready", then takes a number of ticks per line of standard input and answers each with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from swarm_core.config import load
from swarm_core.learning import optimizer as optim
from swarm_core.learning.batch import Batch, make_batch
from swarm_core.learning.grpo import Denominators, Metrics, grpo_loss, merge_metrics
from swarm_core.learning.logprobs import token_logprobs
from swarm_core.learning.microbatch import completion_rows
from swarm_core.learning.rollout import to_samples
from swarm_core.manifest import Manifest, make_manifest
from swarm_core.models.architecture import fingerprint, read_shape
from swarm_core.wire.allocator import keep_large_blocks
from swarm_worker.compute import StageCompute
from swarm_worker.sampler.replay import read_rollouts


def read_manifest(config_path: Path) -> Manifest:
    """The manifest that the anchor would make of this run file."""
    config = load(config_path)
    return make_manifest(config, read_shape(config.model.path), fingerprint(config.model.path))


def read_batches(manifest: Manifest, rollouts: Path, compute: StageCompute) -> list[Batch]:
    """The recorded batches as stage 0 of the swarm makes them: same samples, same order, same microbatches."""
    g = manifest.config.grpo
    batches = []
    for recorded in read_rollouts(rollouts, g.completions_per_prompt, groups=g.prompts_per_batch):
        samples, stats = to_samples(recorded, compute.loss_spec)
        d = stats.denominators
        size = manifest.config.swarm.microbatch_size
        batches.append(make_batch(recorded.batch, 0, [samples], [d.tokens], [d.sequences], size))
    return batches


@dataclass(frozen=True)
class Timing:
    """One tick of one rank, in seconds: all of it, and what was not spent on links."""

    tick_s: float
    busy_s: float


class TimedStage(PipelineStage):
    """torch's stage that also adds up the time of its forwards and backwards."""

    busy_s = 0.0

    def forward_one_chunk(self, *arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        result = super().forward_one_chunk(*arguments, **named)
        self.busy_s += time.perf_counter() - started
        return result

    def backward_one_chunk(self, *arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        result = super().backward_one_chunk(*arguments, **named)
        self.busy_s += time.perf_counter() - started
        return result


class TorchStage:
    """One rank: its stage, its optimizer, and a tick."""

    def __init__(self, rank: int, manifest: Manifest, batches: Sequence[Batch], compute: StageCompute) -> None:
        self.rank = rank
        self.manifest = manifest
        self.batches = batches
        self.compute = compute  # a holder of layers, optimizer and loss settings; none of its work is used
        counts = {batch.microbatches for batch in batches}
        shapes = {tuple(b.ids(0, i).shape) for b in batches for i in range(b.microbatches[0])}
        if len(counts) != 1 or len(shapes) != 1:
            raise ValueError(f"torch's schedule wants fixed shapes; got microbatches {counts} of shapes {shapes}")
        self.microbatches = batches[0].microbatches[0]
        (B, T), H = shapes.pop(), manifest.link().width
        ids_BT, h_BTH = torch.zeros(B, T, dtype=torch.int64), torch.zeros(B, T, H)
        h_in, h_out = h_BTH.clone().requires_grad_(), h_BTH.clone().requires_grad_()
        self.pipe = TimedStage(
            compute.stage,
            rank,
            manifest.stages,
            torch.device("cpu"),
            input_args=(ids_BT if rank == 0 else h_in,),
            output_args=(h_out,),
        )
        # The loss is divided by denominators of the whole tick already: no further scaling.
        self.schedule = Schedule1F1B(self.pipe, self.microbatches, loss_fn=self._loss, scale_grads=False)
        self.ticks = 0
        self._batch = batches[0]
        self._metrics: list[Metrics] = []

    def _loss(self, h_BTH: Tensor, index: Tensor) -> Tensor:
        """The loss of one microbatch on the last stage, as StageCompute.loss has it."""
        started = time.perf_counter()
        config = self.manifest.config
        mb = self._batch.microbatch(0, int(index))
        h_MH = completion_rows(h_BTH, mb.layout)
        logp_M, entropy_M = token_logprobs(
            h_MH, self.compute.stage.lm_head_weight, mb.targets_M, config.grpo.temperature, config.swarm.logprob_chunk
        )
        denominators = Denominators(self._batch.slice_tokens[0], self._batch.slice_sequences[0])
        loss, metrics = grpo_loss(logp_M, mb, self.compute.loss_spec, denominators, None, entropy_M)
        self._metrics.append(metrics)
        self.pipe.busy_s += time.perf_counter() - started
        return loss

    def accumulate(self) -> dict[str, float]:
        """Forward and backward of all microbatches; the tick's metrics on the last rank."""
        self._batch = self.batches[self.ticks % len(self.batches)]
        self.ticks += 1
        if self.rank == 0:
            ids = torch.cat([self._batch.ids(0, index) for index in range(self.microbatches)])
            self.schedule.step(ids, return_outputs=False)
            return {}
        self.schedule.step(target=torch.arange(self.microbatches), losses=[], return_outputs=False)
        metrics, self._metrics = merge_metrics(self._metrics), []
        return metrics

    def tick(self) -> Timing:
        """One optimizer step over both ranks: 1F1B, global norm, clip, AdamW."""
        started = time.perf_counter()
        self.pipe.busy_s = 0.0
        self.accumulate()
        reduced = time.perf_counter()
        squares = torch.tensor([sum(norm * norm for norm in optim.gradient_norms(self.compute.parameters))])
        own_s = time.perf_counter() - reduced
        dist.all_reduce(squares)
        stepped = time.perf_counter()
        spec = self.compute.optimizer_spec
        coefficient = optim.clip_coefficient([float(squares.sqrt())], spec.max_grad_norm)
        optim.apply(self.compute.optimizer, coefficient, optim.learning_rate(spec, self.ticks))
        ended = time.perf_counter()
        return Timing(ended - started, self.pipe.busy_s + own_s + ended - stepped)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--config", type=Path, required=True, help="the run file")
    parser.add_argument("--rollouts", type=Path, required=True, help="recorded rollouts")
    parser.add_argument("--rendezvous", type=Path, required=True, help="a file that does not exist yet")
    parser.add_argument("--gradients", type=Path, help="run one tick, write its gradients and loss there, and leave")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_large_blocks()  # as the swarm's stages do: an allocator is no part of the comparison
    manifest = read_manifest(arguments.config)
    where = f"file://{arguments.rendezvous.resolve()}"
    dist.init_process_group("gloo", init_method=where, rank=arguments.rank, world_size=manifest.stages)
    try:
        compute = StageCompute(manifest, arguments.rank, manifest.config.model.path, torch.device("cpu"))
        stage = TorchStage(arguments.rank, manifest, read_batches(manifest, arguments.rollouts, compute), compute)
        if arguments.gradients is not None:
            metrics = stage.accumulate()
            held = {name: p.grad for name, p in zip(compute.names, compute.parameters, strict=True)}
            save_file(held, arguments.gradients, {"loss": float(metrics.get("loss", 0.0)).hex()})
            return 0
        print("ready", flush=True)
        for line in sys.stdin:
            timings = [stage.tick() for _ in range(int(line))]
            print(json.dumps([[t.tick_s, t.busy_s] for t in timings]), flush=True)
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
