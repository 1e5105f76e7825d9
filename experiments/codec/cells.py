"""Which models the table trains, on what, and its cells: names for overrides of a run file. Runs nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from swarm_core.data.dataset import Row

ROOT = Path(__file__).resolve().parents[2]
DENSE = "dense"


@dataclass(frozen=True)
class Model:
    """A run file, what the table changes in it for all of its cells, and how many held-out problems are asked at the end."""

    run_file: Path
    workload: dict[str, str]
    problems: int


MODELS = {
    "tiny": Model(
        ROOT / "examples" / "tiny" / "run.toml",
        {
            "run.ticks": "96",
            "swarm.microbatch_size": "256",
            "grpo.prompts_per_batch": "64",
            "optimizer.lr": "3e-4",
            "optimizer.schedule": "linear",
            "sampler.overlap": "false",
        },
        problems=2100,
    ),
    "wide": Model(ROOT / "examples" / "wide" / "run.toml", {}, problems=2048),
}


def links(**knobs: object) -> dict[str, str]:
    """Overrides of the [links] section."""
    return {f"links.{name}": json.dumps(value).strip('"') for name, value in knobs.items()}


CENTRE: dict[str, dict[str, object]] = {
    "tiny": {"rank_forward": 0.5, "rank_backward": 0.33, "step_forward": 0.5, "step_backward": 0.5},
    "wide": {"rank_forward": 48, "rank_backward": 48, "step_forward": 0.5, "step_backward": 0.5},
}


def near(model: str, cadence: int = 64, **knobs: object) -> dict[str, str]:
    """The centre of a model's table with one factor changed."""
    return {**links(**{**CENTRE[model], **knobs}), "anchor.q_cadence": str(cadence)}


CELLS: dict[str, dict[str, dict[str, str]]] = {
    "tiny": {
        DENSE: links(kind="none"),
        "centre": near("tiny"),
        "fit weighted": near("tiny", fit="weighted"),
        "fit plain": near("tiny", fit="plain"),
        "fixed basis": near("tiny", cadence=0),
        "rank 24, 16": near("tiny", rank_forward=24, rank_backward=16),
        "rank 72, 48": near("tiny", rank_forward=72, rank_backward=48),
        "steps x 2": near("tiny", step_forward=1.0, step_backward=1.0),
        "steps / 2": near("tiny", step_forward=0.25, step_backward=0.25),
        "bf16": near("tiny", quantiser_forward="bf16", quantiser_backward="bf16"),
        "int8": near("tiny", quantiser_forward="int8", quantiser_backward="int8"),
        "int4": near("tiny", quantiser_forward="int4", quantiser_backward="int4"),
        "a step a row": near("tiny", gradient_scale="row"),
        "no reuse deltas": near("tiny", reuse_deltas=False),
        "exact": near("tiny", backward="exact"),
        "rank 12, 16": near("tiny", rank_forward=12, rank_backward=16),
        "rank 12, 16, weighted": near("tiny", rank_forward=12, rank_backward=16, fit="weighted"),
        "weighted, steps / 2": near("tiny", fit="weighted", step_forward=0.25, step_backward=0.25),
    },
    "wide": {
        DENSE: links(kind="none"),
        "centre": near("wide"),
        "fit weighted": near("wide", fit="weighted"),
        "rank 24, 24": near("wide", rank_forward=24, rank_backward=24),
    },
}


@cache
def held_out(count: int) -> tuple[Row, ...]:
    """Sums that no run has trained on, nor their mirror images (b+a of a+b): validation.jsonl first, then the others.

    The supervised training that made the models saw all but the validation rows; they are new to the policy gradient.
    """
    from examples.tiny.build import DATA_SEED, TRAIN_ROWS, split_pairs  # needs transformers: a second

    train, validation = split_pairs(DATA_SEED)
    used = {frozenset(pair) for pair in train[:TRAIN_ROWS]}
    pairs = [*validation, *(pair for pair in train[TRAIN_ROWS:] if frozenset(pair) not in used)]
    return tuple(Row(f"{a}+{b}=", str(a + b)) for a, b in pairs[:count])
