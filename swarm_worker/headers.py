"""Stamps and positions <-> frame headers. Pure; the one place that says which header field means what to a stage."""

from __future__ import annotations

from dataclasses import dataclass

from swarm_core.wire.frames import Header, address_of
from swarm_core.wire.messages import Decide, FrameKind, Mode, Outcome
from swarm_worker.lead import lineage_hash
from swarm_worker.schedule import Stamp

RoundKey = tuple[int, int, int, Mode, int]


@dataclass(frozen=True)
class Position:
    """Where a stage stands in the history of the run."""

    tick: int = 0
    lineage: int = 0
    epoch: int = 1

    def after(self, stamp: Stamp, decide: Decide) -> Position:
        """The position once this decision is applied."""
        if decide.outcome == Outcome.HOLD:
            return self
        lineage = lineage_hash(stamp.lineage, stamp.epoch, stamp.attempt, Outcome(decide.outcome))
        return Position(stamp.tick + 1, lineage, self.epoch)


def header_of(kind: FrameKind, run: int, stamp: Stamp, receiver: int, microbatch: int = 0) -> Header:
    """The header of a frame of this round for stage `receiver`."""
    return Header(
        kind=kind,
        run=run,
        epoch=stamp.epoch,
        tick=stamp.tick,
        attempt=stamp.attempt,
        lineage=stamp.lineage,
        mode=stamp.mode,
        batch=stamp.batch,
        pass_=stamp.pass_,
        slice=stamp.slice,
        microbatch=microbatch,
        receiver=address_of(receiver),
    )


def identity(h: Header) -> Stamp:
    """The round that a frame belongs to; what a BEGIN stamps beyond it is left at 0."""
    return Stamp(h.epoch, h.tick, h.attempt, h.lineage, h.mode, h.batch, h.pass_, h.slice)


def key(header: Header) -> RoundKey:
    return identity(header).key
