"""The epochs of a run at the anchor: ends one, gathers what every stage holds, starts the next. No file of the books is opened.

What follows from what is in rounds.py, without a stream; here is who is told, what is written before, and what goes back
with a run that lost ticks.
"""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING

from anchor_node.roster import Member
from anchor_node.rounds import Line, Phase, Rounds
from anchor_node.samplers import EVALUATION
from swarm_core.wire.errors import NothingHeld, StaleEpoch
from swarm_core.wire.messages import Fence, FrameKind, Held, Start
from swarm_core.wire.outbox import Outbox

if TYPE_CHECKING:
    from anchor_node.service import AnchorService

log = logging.getLogger(__name__)


class Epochs:
    """Those of one run."""

    def __init__(self, anchor: AnchorService) -> None:
        self._anchor = anchor
        self.rounds = Rounds(anchor.manifest.stages, anchor.memory.epoch, anchor.memory.start_id)
        self._line: Line | None = None  # where this epoch begins; None: from the model or a checkpoint
        self._why = ""  # of the newest FENCE
        self._all_anew = False  # where stages share no version, there is still the newest checkpoint

    def begin(self) -> None:
        """A run begins: its first epoch, or the next one where stages have been asked for older ones already."""
        self.rounds = Rounds(self._anchor.manifest.stages, self.rounds.epoch, secrets.randbits(64))
        self._line, self._anchor.roster.epoch = None, self.rounds.epoch
        self._anchor.roster.start()
        self.rounds.work()

    def carry_on(self) -> None:
        """All stages of a run that another anchor started are there: nobody needs another epoch, or one begins."""
        if self._anchor.roster.unbroken:
            self.rounds.work()
        else:
            self.fence("the anchor is back, and not every stage is where it was")

    def all_anew(self) -> None:
        """Nobody is left of a run that was at work (a power cut): it goes on from what all logs hold, if they agree on any."""
        self._all_anew = self._anchor.roster.started = True
        self.fence("every stage begins anew")

    def rejoined(self, member: Member, box: Outbox) -> None:
        """A stage of a run at work is there again: the same process, or one that takes the place of a lost one."""
        if self._anchor.over.done():
            self._anchor.tell_end(box)
        elif self.rounds.phase is Phase.FENCED:
            self._post_fence(box)
        elif not member.fit:
            self.fence(f"stage {member.stage} at {member.address} begins anew")

    def fence(self, reason: str) -> None:
        """End the epoch. The next one is on disk before anybody hears of it."""
        anchor = self._anchor
        anchor.memory.epoch = anchor.roster.epoch = self.rounds.fence()
        self._why = reason
        anchor.event("fence", f"epoch {anchor.roster.epoch - 1} ends at tick {anchor.tick}: {reason}")
        anchor.memory.save(anchor.out, sync=True)
        for box in anchor.stages.values():
            self._post_fence(box)

    def asked(self, fence: Fence) -> None:
        """A stage cannot go on. Others may have said so before, or it has heard the last decision and misses nothing."""
        owed = self._anchor.owed
        if (
            fence.epoch == self.rounds.epoch
            and self.rounds.phase is Phase.WORKING
            and (owed is None or owed - {EVALUATION})
        ):
            self.fence(fence.reason)

    def take(self, stage: int, held: Held) -> None:
        """A stage's answer to the FENCE. Raises BadFrame, NothingHeld."""
        try:
            line = None if self._anchor.over.done() else self.rounds.take(stage, held)
        except StaleEpoch as error:  # said again on a new stream, and of no more use
            log.info("%s", error)
            return
        except NothingHeld as error:
            if not self._all_anew:
                raise
            self._all_anew = self._anchor.roster.started = False
            self.rounds.work()  # what the others answer is of no use any more
            log.warning("%s", error)
            self._anchor.event(
                "from_checkpoint", "the stages' logs share no version: the run goes on from its newest checkpoint"
            )
            self._anchor.begin()
            return
        if line is not None:
            self._start(line)

    def _post_fence(self, box: Outbox) -> None:
        self._anchor.post(box, FrameKind.FENCE, Fence(self.rounds.epoch, self._why))

    def _start(self, line: Line) -> None:
        """Every stage has said what it holds: the next epoch begins at the newest version of all."""
        anchor, self._all_anew = self._anchor, False
        self._line, (tick, _) = line, line.version
        lost = anchor.tick - tick
        reported, anchor.owed = min(anchor.books.ticks(), tick), None
        if lost > 0:
            anchor.books.cut(tick)
            anchor.forget_later(tick)
            if anchor.slow.corrector is not None:
                anchor.slow.corrector.take_up(tick)
        anchor.tick = anchor.memory.tick = tick
        known = set(anchor.memory.roles)
        for member in anchor.roster.members.values():
            anchor.memory.enter(member.number, f"stage {member.stage}")
        for number in known - {str(m.number) for m in anchor.roster.members.values()}:
            if anchor.memory.roles[number].startswith("stage"):
                anchor.memory.leave(int(number))
        anchor.roster.start()
        anchor.server.door.begin_epoch()
        anchor.books.mark()
        for stage, box in anchor.stages.items():
            anchor.slow.post_bases_to_newcomer(box, stage)
            anchor.post(box, FrameKind.START, self.start_message(reported))
            anchor.slow.post_corrections(stage)
        anchor.samplers.start_again()
        anchor.samplers.start()
        anchor.drain_again()
        what = f"epoch {line.epoch} begins at tick {tick}" + (f"; {lost} ticks are lost" if lost > 0 else "")
        anchor.event("start", what, {"epoch": line.epoch, "lost_ticks": max(0, lost)})

    def start_message(self, reported: int = 0) -> Start:
        """Where this epoch begins, and with whom. `reported`: rows of ticks below it are in the books."""
        anchor = self._anchor
        start = Start(
            epoch=anchor.roster.epoch, stage_addresses=anchor.roster.addresses(), start_id=self.rounds.start_id
        )
        if self._line is not None:
            (start.tick, start.lineage), start.recovery = self._line.version, True
            start.decide, start.reported_tick = self._line.decide, reported
        elif anchor.resume is not None:
            start.checkpoint = anchor.resume.name
            start.shard_digests = {stage: saved.digest for stage, saved in anchor.resume.shards.items()}
        return start
