"""What takes turns: swarms that differ in nothing but their corrections, on work that both have. No figure here.

A turn is one default m_cadence, so every turn of a side holds as many snapshots as every other. SETTLE ticks before the
first one move the snapshots, which fall on multiples of the cadence, away from both ends of a turn.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.bench.figures import SETTLING
from experiments.bench.sides import Tick
from experiments.bench.swarm_side import TURN_LIMIT_S, SwarmSide
from experiments.bench.workload import ROOT, TINY_MODEL, Setup, Workload
from experiments.bench.workload import build as build_identity
from experiments.children import BenchError, Child
from swarm_core.knobs import AnchorSection

CADENCE = AnchorSection().m_cadence
OFTEN = 10  # ticks: the other cadence, to see how the cost grows
SETTLE = 2 * OFTEN - SETTLING  # the last snapshot of a turn leaves 7 ticks for its replay, which takes about 3
OFF = "off"
# With identity links a correction would be zero, so the links compress as those of examples/tiny do.
LINKS = ("links.kind=lowrank", "links.rank_forward=0.5", "links.rank_backward=0.33", "links.zstd=auto")
SIDES = {
    OFF: ("corrections.merger=none",),
    "on": ("corrections.merger=held_delta",),
    f"on, every {OFTEN} ticks": ("corrections.merger=held_delta", f"anchor.m_cadence={OFTEN}"),
}
# An idle side uses next to no CPU: two of the kernel's clock ticks in a look are more than its timers take.
LOOK_S, IDLE_S = 0.25, 0.02


@dataclass(frozen=True)
class AnchorTurn:
    """The ticks of a turn, the first of them tick `first` of its run; CPU seconds of the whole turn, what it left to be
    done after its last tick included: of both stages, and of the anchor."""

    first: int
    ticks: list[Tick]
    stage_cpu_s: float
    anchor_cpu_s: float

    @property
    def counted(self) -> list[Tick]:
        return self.ticks[SETTLING:]


class AnchorSide(SwarmSide):
    """A swarm whose turn is over when its anchor has nothing left to do: a replay must not run into another's turn."""

    def anchor_turn(self, ticks: int) -> AnchorTurn:
        first, stages, anchor = self._fed, _cpu_s(self.stages), self.anchor.cpu_s()
        measured = self.turn(ticks).ticks
        self._rest()
        return AnchorTurn(first, measured, _cpu_s(self.stages) - stages, self.anchor.cpu_s() - anchor)

    def _rest(self) -> None:
        everyone = (self.anchor, *self.stages, self.sampler)
        deadline = time.monotonic() + TURN_LIMIT_S
        used, before = _cpu_s(everyone), -1.0
        while used - before > IDLE_S:
            if time.monotonic() > deadline:
                raise BenchError(
                    f"side {self.name} is not idle {TURN_LIMIT_S:.0f} s after its turn; logs in {self.out}"
                )
            time.sleep(LOOK_S)
            self._check_alive()
            used, before = _cpu_s(everyone), used


def _cpu_s(children: Sequence[Child]) -> float:
    return sum(child.cpu_s() for child in children)


def build(workload: Workload, folder: Path) -> Setup:
    """The bench's files with what a basis is calibrated on: a tokenizer and the prompts of examples/tiny."""
    setup = build_identity(workload, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_MODEL / name, setup.model / name)
    shutil.copy(ROOT / "examples" / "tiny" / "data" / "train.jsonl", folder / "rows.jsonl")
    return setup


def start(workload: Workload, folder: Path, name: str, overrides: Sequence[str] = ()) -> AnchorSide:
    """The side `name` of SIDES, with a folder, files and a run of its own."""
    own = folder / name.replace(",", "").replace(" ", "-")
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise BenchError(f"two stages want 2 cores; this process may use {len(cores)}")
    return AnchorSide(build(workload, own), own, cores, name, (*LINKS, *SIDES[name], *overrides))
