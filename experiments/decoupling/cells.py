"""The cells of the decoupling experiment: names for overrides of a run file, and how a basis is refreshed in them. Runs nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUN_FILE = ROOT / "examples" / "tiny" / "run.toml"
DENSE, NONE = "dense", "none"
EVAL_EVERY = 8  # ticks between two exact evaluations

WORKLOAD = {
    "run.ticks": "240",
    "swarm.microbatch_size": "128",
    "grpo.prompts_per_batch": "16",
    "grpo.completions_per_prompt": "8",
    "grpo.ticks_per_pass": "2",
    "grpo.max_reuse": "1",
    "optimizer.lr": "2e-5",
    "sampler.overlap": "false",
    "links.fidelity_every": "0",
    "links.rank_forward": "12",
    "links.rank_backward": "16",
}


@dataclass(frozen=True)
class Cell:
    """`basis_lag`: ticks between the end of a window and the tick after which all stages hold the basis made of it.
    `cold_prompts`: 0, or a basis is fitted afresh at each refresh, on so many training prompts at the weights then."""

    overrides: dict[str, str] = field(default_factory=dict)
    basis_lag: int = 0
    cold_prompts: int = 0


def signed(delay_k: int, cadence: int, beta_anc: float = 0.5) -> Cell:
    """The record's merger. Corrections and bases share one cadence, as in its fire block."""
    return _corrected("signed_ema", delay_k, cadence, {"alpha": "0.25", "beta_anc": str(beta_anc)})


def held(delay_k: int, cadence: int, **knobs: str) -> Cell:
    return _corrected("held_delta", delay_k, cadence, {"age_decay": "0.88", "lambda_cap": "0.5", **knobs})


def _corrected(merger: str, delay_k: int, cadence: int, knobs: dict[str, str]) -> Cell:
    anchor = {"latency": "fixed", "delay_k": delay_k, "m_cadence": cadence, "q_cadence": cadence}
    overrides = {f"anchor.{name}": str(value) for name, value in anchor.items()}
    overrides |= {f"corrections.{name}": value for name, value in {"merger": merger, **knobs}.items()}
    return Cell(overrides)


def uncorrected(cadence: int) -> Cell:
    return Cell({"anchor.q_cadence": str(cadence)})


GRID = {
    DENSE: Cell({"links.kind": "none"}),
    f"{NONE}, cadence 5": uncorrected(5),
    f"{NONE}, cadence 20": uncorrected(20),
    "signed_ema K=5, cadence 5": signed(5, 5),
    "signed_ema K=20, cadence 5": signed(20, 5),
    "signed_ema K=5, cadence 20": signed(5, 20),
    "signed_ema K=20, cadence 20": signed(20, 20),
    "held_delta K=5, cadence 5": held(5, 5),
    "held_delta K=20, cadence 20": held(20, 20),
}
CELLS = GRID
