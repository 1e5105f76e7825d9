"""Epochs: when one ends, what every stage still holds, and where the next one begins. Sans-I/O; no stream, file or clock.

An epoch ends with a FENCE, which is on disk before it is sent (the caller's duty). Every stage answers with the versions
that it can go back to; the next epoch begins from the newest one that all of them share. A version is a tick with its
lineage, the hash chain over all decisions before it, so two stages never agree on a tick and mean different histories.
A stage that has voted on a tick and has not heard the decision can reach what either decision leads to.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from swarm_core.wire.errors import BadFrame, NothingHeld, StaleEpoch
from swarm_core.wire.messages import Decide, Held

Version = tuple[int, int]  # tick, lineage


class Phase(enum.Enum):
    """Where a run stands."""

    GATHERING = "gathering"  # the first start: stages load
    WORKING = "working"
    FENCED = "fenced"  # waiting until every stage has said what it holds


@dataclass(frozen=True)
class Line:
    """Where an epoch begins: a version that every stage holds, and the decision that led to it."""

    epoch: int
    version: Version
    decide: Decide = field(default_factory=Decide)


class Rounds:
    """The epochs of one start of a run. `start_id` names it: what stages hold of another start is no history here."""

    def __init__(self, stages: int, epoch: int = 1, start_id: int = 0) -> None:
        self.stages = stages
        self.epoch = epoch
        self.start_id = start_id
        self.phase = Phase.GATHERING
        self._held: dict[int, Held] = {}

    def work(self) -> None:
        """All stages have been started, or have come back from the same epoch."""
        self.phase = Phase.WORKING
        self._held.clear()

    def fence(self) -> int:
        """End the epoch; returns the number of the next one. What was said of what is held counts no more."""
        self.epoch += 1
        self.phase = Phase.FENCED
        self._held.clear()
        return self.epoch

    def gone(self, stage: int) -> None:
        """The process that held this stage is not there any more; whoever takes its place says anew what it holds."""
        self._held.pop(stage, None)

    def missing(self) -> list[int]:
        """Stages that have not yet said what they hold."""
        return [stage for stage in range(self.stages) if stage not in self._held]

    def take(self, stage: int, held: Held) -> Line | None:
        """A stage's answer to the FENCE; the line once every stage has answered.

        Raises StaleEpoch for an answer to an earlier one, BadFrame for one that makes no sense, and NothingHeld for a
        stage that shares no version with the others: it is not counted, and another one may take its place.
        """
        if held.epoch != self.epoch or self.phase is not Phase.FENCED:
            raise StaleEpoch(f"stage {stage} says what it holds for epoch {held.epoch}; this is epoch {self.epoch}")
        if len(held.ticks) != len(held.lineages) or any(
            b <= a for a, b in zip(held.ticks, held.ticks[1:], strict=False)
        ):
            raise BadFrame(
                f"stage {stage} names {len(held.ticks)} ticks and {len(held.lineages)} lineages, or not in order"
            )
        mine = versions_of(held) if held.start_id == self.start_id else set()
        if not common([mine, *(versions_of(other) for other in self._held.values())]):
            raise NothingHeld(
                f"stage {stage} holds {_span(mine)}, which no other stage shares: start it with the --out folder of the "
                f"worker that held stage {stage}, or with a copy of its redo and checkpoints folders"
            )
        self._held[stage] = held
        if self.missing():
            return None
        # Of decisions stage 0 tells the newest alone: who has voted on an earlier tick, as the copy of a stage that was
        # lost may have, goes back to before it.
        lead = self._held[0]
        told = lead.ticks[-1], lead.lineages[-1]
        version = common([applied(other) | versions_of(other) & {told} for other in self._held.values()])
        if version is None:
            del self._held[stage]
            raise NothingHeld(f"stage {stage} holds {_span(mine)}; the others have not applied those, or not any more")
        self.work()
        return Line(self.epoch, version, lead.decided if told == version else Decide())


def applied(held: Held) -> set[Version]:
    """What a stage has applied."""
    return set(zip(held.ticks, held.lineages, strict=True))


def versions_of(held: Held) -> set[Version]:
    """Everything a stage can reach: what it has applied, and what the decision of a tick that it voted on leads to."""
    return applied(held) | {(held.ticks[-1] + 1, lineage) for lineage in held.pending if held.ticks}


def common(held: list[set[Version]]) -> Version | None:
    """The newest version in all of them."""
    return max(set.intersection(*held), default=None)


def _span(versions: set[Version]) -> str:
    if not versions:
        return "nothing of this run"
    return f"ticks {min(versions)[0]} to {max(versions)[0]} of another history"
