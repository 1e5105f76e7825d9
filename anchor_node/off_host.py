"""Copies of the stages' files at the anchor's streams: parts in, answers and parts out, how far they are behind. Opens no file itself.

What lies where, and what is checked, is in copies.py; here is whose word counts, and when.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from anchor_node.copies import StageCopy
from anchor_node.roster import Member
from swarm_core.run_folder import MOST_LOST
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.frames import Frame
from swarm_core.wire.messages import Copies, Copy, CopyWanted, FrameKind, from_bytes
from swarm_core.wire.outbox import Outbox

if TYPE_CHECKING:
    from anchor_node.service import AnchorService

COPIES = "copies"  # what a run that has finished may still owe
LAG = "copy/lag_ticks"


class OffHost:
    """Of one run: a copy for every stage that sends one."""

    def __init__(self, anchor: AnchorService) -> None:
        self._anchor = anchor
        stages = anchor.manifest.stages
        self.copies = [StageCopy(anchor.out, stage, stages) for stage in range(stages)]
        self._turns = [asyncio.Lock() for _ in range(stages)]  # files are touched in the order of the frames
        self._tasks: set[asyncio.Task[None]] = set()
        self._refusals: dict[int, str] = {}
        self._sending: set[int] = set()  # stages that have sent a part to this anchor
        self._moved = True  # a part has come since the last reminder
        self._last = ""  # checkpoint that the run ends with, once it has finished
        self._behind: set[int] = set()

    def take(self, member: Member, box: Outbox, frame: Frame) -> None:
        """A COPY, COPIES or COPY_WANTED of a stage. Raises BadFrame."""
        stage = member.stage
        match frame.header.kind:
            case FrameKind.COPY:
                part = from_bytes(Copy, frame.payload)
                self.copies[stage].check(part)
                if not member.at_work:
                    raise BadFrame(f"stage {stage} sent COPY before it was started")
                work = self._take_part(stage, box, part)
            case FrameKind.COPIES:
                work = self._list(stage, box, from_bytes(Copies, frame.payload))
            case _:
                wanted = from_bytes(CopyWanted, frame.payload)
                self.copies[stage].check(wanted)
                work = self._give(stage, box, wanted)
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def finished(self, checkpoint: str) -> bool:
        """The run ends with this checkpoint. True while shards of it are on their way; the anchor is told when they are there."""
        self._last = checkpoint
        if missing := self._missing():
            which = f"stage{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
            self._anchor.event("copies", f"the run has finished; the last shard of {which} is being copied here")
        return bool(missing)

    def _missing(self) -> list[int]:
        """Stages whose last shard is to come."""
        coming = (i for i in sorted(self._sending) if not self._refusals.get(i))
        return [i for i in coming if not self.copies[i].has_shard(self._last)]

    def remind(self) -> None:
        """Once a minute while a run that has finished waits for copies: one that does not move any more is not waited for."""
        if not self._last or not (missing := self._missing()):
            return
        if self._moved:
            self._anchor.event(
                "copies", f"still being copied: the last shards of stages {', '.join(map(str, missing))}"
            )
        else:
            self._anchor.event(
                "copies_given_up", f"no part came for a minute: the last shards of stages {missing} stay there"
            )
            self._anchor.settle(COPIES)
        self._moved = False

    def completed(self) -> None:
        """A checkpoint is complete: copied shards may be part of it."""
        for copy in self.copies:
            copy.link_into_checkpoints()

    def numbers(self) -> dict[str, float]:
        """For the row of a tick: how far the copy that is furthest behind is. Says so once, where it is too far."""
        lags = {stage: self._anchor.tick - copy.tick for stage, copy in enumerate(self.copies) if copy.tick}
        behind = {stage for stage, lag in lags.items() if lag > MOST_LOST}
        for stage in behind - self._behind:
            what = f"the copy of stage {stage} is {lags[stage]} ticks behind: if its host were lost now, so would be these ticks"
            self._anchor.event("copy_behind", what)
        self._behind = behind
        return {LAG: max(0, *lags.values())} if lags else {}

    async def _take_part(self, stage: int, box: Outbox, message: Copy) -> None:
        async with self._turns[stage]:
            if self._anchor.stages.get(stage) is not box:
                return  # another process has taken its place: its files count
            held = await asyncio.to_thread(self.copies[stage].take, message, self._anchor.epochs.rounds.start_id)
        if held.refused and held.refused != self._refusals.get(stage):
            self._anchor.event("copy_refused", f"stage {stage}, {held.file}: {held.refused}")
        self._refusals[stage] = held.refused
        self._sending.add(stage)
        self._moved = True
        self._anchor.post(box, FrameKind.COPY_HELD, held)
        if self._last and (held.whole or held.refused) and not self._missing():
            self._anchor.settle(COPIES)

    async def _list(self, stage: int, box: Outbox, has: Copies) -> None:
        """To a stage that joins and `has` the log of some start: what it should begin with instead, or nothing.

        Its own may be older than the copy: somebody else has held this stage meanwhile.
        """
        copy, wanted = self.copies[stage], not has.start_id
        if self._anchor.memory.at_work:
            same = has.start_id == copy.start_id
            wanted = copy.start_id == self._anchor.epochs.rounds.start_id
            wanted = wanted and (not same or copy.reach > (has.epoch, has.tick))
        async with self._turns[stage]:
            listed = await asyncio.to_thread(copy.listed) if wanted and copy.start_id else Copies()
        self._anchor.post(box, FrameKind.COPIES, listed)

    async def _give(self, stage: int, box: Outbox, wanted: CopyWanted) -> None:
        async with self._turns[stage]:
            part = await asyncio.to_thread(self.copies[stage].read, wanted)
        self._anchor.post(box, FrameKind.COPY, part)

    def _done(self, task: asyncio.Task[None]) -> None:
        """What goes wrong here is the anchor's own disk, say, and no reason to end a run."""
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._anchor.event("copy_failed", f"{type(error).__name__}: {error}")
