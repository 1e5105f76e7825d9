"""A stage's vote on a tick: its own tally beside what the stages behind it have said. No frame and no decision here."""

from __future__ import annotations

import time

from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import StageVote, Vote
from swarm_worker.compute import Tally

ANCHOR_WAIT = "anchor/wait_s"  # of a tick, awaiting anything of the anchor: by stage, and all together


class Ballot:
    """What one stage knows of the tick that is to be voted on."""

    def __init__(self, stage: int) -> None:
        self._stage = stage
        self._tally: Tally | None = None
        self._downstream: Vote | None = None
        self._cast_at = time.monotonic()

    def tallied(self, tally: Tally) -> None:
        """This stage's own part is known."""
        self._tally = tally

    def came(self, downstream: Vote) -> None:
        """The vote of all stages behind this one. Raises BadFrame for another's."""
        stages = [vote.stage for vote in downstream.votes]
        if not stages or stages != list(range(self._stage + 1, self._stage + 1 + len(stages))):
            raise BadFrame(
                f"stage {self._stage + 1} sent the votes of stages {stages[:9]}; wanted its own and all behind it"
            )
        self._downstream = downstream

    def cast(self, basis_held: int, busy_s: float, corrections_held: list[int]) -> Vote:
        """The vote of this stage and of all behind it. Of the time since the last vote, `busy_s` went into computing."""
        tally, downstream = self._tally, self._downstream or Vote()
        assert tally is not None, "the schedule votes after the tally"
        self._tally, self._downstream = None, None
        now = time.monotonic()
        wall_s, self._cast_at = now - self._cast_at, now
        times = {f"busy_s/stage_{self._stage}": busy_s, f"wait_s/stage_{self._stage}": max(0.0, wall_s - busy_s)}
        ready = not tally.fault
        numbers = tally.numbers | times
        own = StageVote(self._stage, ready, basis_held, tally.norms, numbers, tally.fault, corrections_held)
        return Vote([own, *downstream.votes], tally.gated or downstream.gated)
