"""One cell with one seed: train beside a lagging anchor, evaluate along the way, one row of figures. Keeps no results."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.codec.probe import Probe, right_answers
from experiments.decoupling import sizes
from experiments.decoupling.cells import CELLS, EVAL_EVERY, ROOT, SIZES, WORKLOAD, Cell
from experiments.decoupling.training import LaggingTraining
from swarm_core.config import RunConfig, load
from swarm_core.data.dataset import load_rows
from swarm_core.learning.batch import Batch
from swarm_core.manifest import make_manifest
from swarm_core.models.architecture import eos_ids, read_shape
from swarm_core.wire.messages import Report

RUN_FILE = ROOT / "examples" / "tiny" / "run.toml"
SIZE_CELL = "bytes"
SERIES = {  # what is kept of every tick, by the name in a row
    "reward": "reward",
    "length": "completions/mean_length",
    "entropy": "entropy",
    "clip": "clip_ratio/region_mean",
    "batch": "batch",
    "basis": "basis/version",
    "version": "correction/version",
    "K": "correction/K",
    "age": "correction/age",
    "c": "correction/c",
    "lambda": "correction/lambda",
    "share": "correction/share",
    "cos": "correction/cos",
}


@dataclass(frozen=True)
class Job:
    """A cell with a seed, or with cell `bytes` a model's sizes. `extra` overrides are part of the name."""

    cell: str
    seed: int
    extra: tuple[tuple[str, str], ...] = ()
    model: str = "tiny"

    @property
    def name(self) -> str:
        return "+".join([self.cell, *(f"{key}={value}" for key, value in self.extra)])

    @property
    def spec(self) -> Cell:
        return Cell() if self.cell == SIZE_CELL else CELLS[self.cell]

    @property
    def overrides(self) -> dict[str, str]:
        shared = SIZES[self.model][2] if self.cell == SIZE_CELL else WORKLOAD
        return {**shared, **self.spec.overrides, **dict(self.extra)}

    @property
    def settings(self) -> str:
        """A digest of what the job asks for, so that a cell that has been changed counts as another one."""
        asked = [self.overrides, self.spec.basis_lag, self.spec.cold_prompts]
        if self.cell == SIZE_CELL:
            asked = [self.overrides, SIZES[self.model][1], sizes.SNAPSHOTS]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.model, self.name, self.seed, self.settings

    def config(self) -> RunConfig:
        return load(RUN_FILE, {**self.overrides, "run.seed": str(self.seed)})

    def uncompressed(self) -> RunConfig:
        """The same model and batches over links that change no bit, with nothing beside them."""
        own = ("links.", "anchor.", "corrections.")
        kept = {key: value for key, value in self.overrides.items() if not key.startswith(own)}
        return load(RUN_FILE, {**kept, "links.kind": "identity", "corrections.merger": "none"})


def run_job(job: Job, folder: Path) -> dict[str, Any]:
    """Raises what training raises."""
    torch.set_num_threads(1)
    started, cpu = time.monotonic(), time.process_time()
    where = folder / f"{job.model}-{job.name}-{job.seed}".replace(" ", "_")
    found = sizes.weigh(job.model, dict(job.extra), where) if job.cell == SIZE_CELL else _trained(job, where)
    about = {"model": job.model, "cell": job.name, "seed": job.seed, "settings": job.settings}
    times = {"cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - started}
    return {**about, "overrides": job.overrides, **found, **times}


def _trained(job: Job, folder: Path) -> dict[str, Any]:
    training = LaggingTraining(job.config(), folder, job.spec.basis_lag, job.spec.cold_prompts)
    curve: dict[int, dict[str, float]] = {}
    try:
        path, manifest = training.model_path, training.manifest
        exact = Probe(make_manifest(job.uncompressed(), read_shape(path), manifest.model_fingerprint), path)
        through, problems = Probe(manifest, path), _problems(training)

        def measure() -> None:
            exact.set(training.chain.weights(), None)
            curve[len(training.ticks)] = asdict(exact.accuracy(problems))

        measure()
        while not training.zero.lead.finished:
            training.advance()
            if len(training.ticks) % EVAL_EVERY == 0 and len(training.ticks) not in curve:
                measure()
        measure()
        through.set(training.chain.weights(), training.bases)
        links = asdict(through.accuracy(problems))
    finally:
        training.close()
    return {
        "problems": len(problems.completion_lengths),
        "evaluations": [{"tick": tick, **found} for tick, found in sorted(curve.items())],
        "links": links,
        "series": {name: _series(training.ticks, key) for name, key in SERIES.items()},
        "outcomes": [row.words["skip_reason"] or row.words["outcome"] for row in training.ticks],
        "form_cosines": list(training.cosines.values()),
        "overlaps": [[tick, share] for tick, share in sorted(training.overlaps.items())],
    }


def _series(ticks: list[Report], key: str) -> list[float | None] | None:
    """A number a tick; None where there was none, or not one at all."""
    values = [row.numbers.get(key) for row in ticks]
    if not any(value is not None for value in values):
        return None
    return [float(f"{value:.6g}") if value is not None and math.isfinite(value) else None for value in values]


def _problems(training: LaggingTraining) -> Batch:
    """The validation problems of an evaluation, with their right answers."""
    source, config = training.source, training.manifest.config
    assert config.data.validation is not None
    rows = load_rows(config.data.validation)[: config.sampler.eval_prompts]
    end = eos_ids(training.model_path)[0]
    return right_answers(source.tokenizer, rows, end, len(rows), config.data.chat_template)
