"""One cell of the table with one seed: train, measure, and one row of figures. No file but the run's own is written."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.codec.cells import CELLS, MODELS, held_out
from experiments.codec.probe import Probe, fidelity, right_answers
from experiments.codec.training import Training
from swarm_core.config import RunConfig, load
from swarm_core.learning.batch import Batch, make_batch
from swarm_core.learning.rollout import to_samples
from swarm_core.manifest import make_manifest
from swarm_core.models.architecture import eos_ids, read_shape
from swarm_core.wire.messages import FrameKind, LedgerRow
from swarm_worker.sampler.collect import Collector, SamplingSpec

FIDELITY_PROMPTS, FIDELITY_SAMPLES = 64, 8
FIDELITY_SEED = 1234  # the same batch in every cell and with every seed
LINK_KINDS = ("activation", "gradient")
OVERHEAD_KINDS = ("basis", "sketch")
# Whatever a run file says: links are compared with nothing else at work.
_APART = {"corrections.merger": "none"}


@dataclass(frozen=True)
class Job:
    """A cell of a model with a seed. `extra` overrides come on top of the cell's and are part of its name."""

    model: str
    cell: str
    seed: int
    extra: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return "+".join([self.cell, *(f"{key.removeprefix('links.')}={value}" for key, value in self.extra)])

    @property
    def overrides(self) -> dict[str, str]:
        return {**MODELS[self.model].workload, **CELLS[self.model][self.cell], **dict(self.extra)}

    @property
    def settings(self) -> str:
        """A digest of what the job asks for, so that a cell that has been changed counts as another one."""
        return hashlib.sha256(json.dumps(self.overrides, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.model, self.name, self.seed, self.settings

    def config(self) -> RunConfig:
        return load(MODELS[self.model].run_file, {**_APART, **self.overrides, "run.seed": str(self.seed)})

    def uncompressed(self) -> RunConfig:
        """The same run with links that change no bit."""
        kept = {key: value for key, value in self.overrides.items() if not key.startswith("links.")}
        return load(
            MODELS[self.model].run_file, {**_APART, **kept, "run.seed": str(self.seed), "links.kind": "identity"}
        )


def run_job(job: Job, folder: Path) -> dict[str, Any]:
    """Train and measure. Raises what training raises."""
    torch.set_num_threads(1)
    started, cpu = time.monotonic(), time.process_time()
    training = Training(job.config(), folder / f"{job.model}-{job.name}-{job.seed}")
    try:
        path, manifest = training.model_path, training.manifest
        exact = Probe(make_manifest(job.uncompressed(), read_shape(path), manifest.model_fingerprint), path)
        through = Probe(manifest, path)
        batch, problems = _fidelity_batch(training), _problems(training, MODELS[job.model].problems)

        def measure() -> dict[str, Any]:
            weights = training.chain.weights()
            exact.set(weights, None)
            through.set(weights, training.bases)
            return {
                "weights": asdict(exact.accuracy(problems)),
                "links": asdict(through.accuracy(problems)),
                "fidelity": asdict(fidelity(exact, through, batch)),
            }

        start = measure()
        before_s = time.process_time() - cpu
        training.run()
        after_s = time.process_time() - cpu
        end = measure()
    finally:
        training.close()
    outcomes = [row.words["outcome"] for row in training.ticks]
    return {
        "model": job.model,
        "cell": job.name,
        "seed": job.seed,
        "settings": job.settings,
        "overrides": job.overrides,
        "problems": len(problems.completion_lengths),
        "start": start,
        "end": end,
        "ticks": len(outcomes),
        "committed": outcomes.count("commit"),
        "gated": sum(row.words["skip_reason"] == "gate" for row in training.ticks),
        "rewards": [row.numbers["reward"] for row in training.ticks if row.numbers["pass"] <= 1],
        "bytes": byte_figures(training.chain.ledger.take(), training.chain.rows, manifest.width),
        "train_cpu_s": after_s - before_s,
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.monotonic() - started,
    }


def byte_figures(ledger: list[LedgerRow], rows: dict[FrameKind, int], width: int) -> dict[str, Any]:
    """Message bytes by kind, what dense bf16 rows would have been, and both per row and direction, a boundary each."""
    totals = {kind: sum(r.message_bytes for r in ledger if r.kind == kind) for kind in (*LINK_KINDS, *OVERHEAD_KINDS)}
    dense = 2 * width * sum(rows.values())
    return {
        "message": totals,
        "dense": dense,
        "share_of_dense": sum(totals.values()) / dense,
        "forward_per_token": totals["activation"] / rows[FrameKind.ACTIVATION],
        "backward_per_token": totals["gradient"] / rows[FrameKind.GRADIENT],
        "basis_and_sketch_share": sum(totals[kind] for kind in OVERHEAD_KINDS) / sum(totals.values()),
    }


def _fidelity_batch(training: Training) -> Batch:
    """Completions of held-out problems by the initial weights, with the advantages of their rewards, in one slice."""
    source, config = training.source, training.manifest.config
    length = config.grpo.max_completion_length
    spec = SamplingSpec(FIDELITY_PROMPTS, FIDELITY_SAMPLES, max_new_tokens=length, seed=FIDELITY_SEED)
    rows = held_out(FIDELITY_PROMPTS)
    rollouts = Collector(source.engine, source.tokenizer, rows, source.verifier, spec).collect(0).rollouts
    samples, stats = to_samples(rollouts, training.chain.stages[-1].loss_spec)
    counts = stats.denominators
    return make_batch(0, 0, [samples], [counts.tokens], [counts.sequences], config.swarm.microbatch_size)


def _problems(training: Training, count: int) -> Batch:
    source, config = training.source, training.manifest.config
    end = eos_ids(training.model_path)[0]
    size = config.swarm.microbatch_size
    return right_answers(source.tokenizer, held_out(count), end, size, config.data.chat_template)
