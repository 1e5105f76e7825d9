"""Which checkpoint a run goes on from: the newest whose shards all stages still hold whole. Asks them; opens no shard itself.

A complete checkpoint was whole once. What became of a shard since, on a disk that is another machine's, only its stage can
tell; so before START every stage is asked about its own shard of the newest one (CHECK), and where one is damaged or gone
(CHECKED), all are asked about the one before. What is passed over is set aside when the run begins.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from anchor_node.checkpoints import Checkpoint, CheckpointError
from swarm_core.wire.messages import Check, Checked, FrameKind

if TYPE_CHECKING:
    from anchor_node.service import AnchorService

log = logging.getLogger(__name__)
MOST_LETTERS = 300  # of what a stage says is wrong


class Resuming:
    """The checkpoints that a run may go on from, newest first; none where it begins from the model."""

    def __init__(self, anchor: AnchorService, candidates: Sequence[Checkpoint]) -> None:
        self._anchor = anchor
        self._candidates = list(candidates)
        self._asked: set[int] = set()
        self._whole: set[int] = set()
        self._wrong: list[str] = []
        self.use: Callable[[Checkpoint], None] = lambda checkpoint: None  # its bases, in place of those of a newer one

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The one to go on from, as far as is known."""
        return self._candidates[0] if self._candidates else None

    def settled(self) -> bool:
        """Whether the run can begin. Where some stages have yet to say what they hold, they are asked."""
        if (checkpoint := self.checkpoint) is None:
            return not self._wrong
        for stage, box in self._anchor.stages.items():
            if stage not in self._asked | self._whole:
                self._asked.add(stage)
                self._anchor.post(box, FrameKind.CHECK, Check(checkpoint.name, checkpoint.shards[stage].digest))
        return len(self._whole) == self._anchor.manifest.stages

    def take(self, stage: int, checked: Checked) -> None:
        """A stage's answer; one about a checkpoint that was passed over meanwhile is of no more use."""
        if (checkpoint := self.checkpoint) is None or checked.checkpoint != checkpoint.name or stage not in self._asked:
            return
        if checked.wrong:
            self._pass_over(f"stage {stage}: {' '.join(checked.wrong.split())[:MOST_LETTERS]}")
        else:
            self._whole.add(stage)
        if not self._anchor.roster.missing() and self.settled():
            self._anchor.begin()

    def tell(self) -> None:
        """The run begins: what was passed over is an event of it. Said before, it would be cut off with later ticks."""
        for wrong in self._wrong:
            self._anchor.event("passed_over", wrong)
        self._wrong = []

    def gone(self, stage: int) -> None:
        """Whoever takes its place is asked anew."""
        self._asked.discard(stage)
        self._whole.discard(stage)

    def _pass_over(self, why: str) -> None:
        torn = self._candidates.pop(0)
        self._wrong.append(f"{torn.name}: {why}")
        self._asked, self._whole = set(), set()
        if (older := self.checkpoint) is None:
            self._anchor.fail(
                CheckpointError(
                    f"no checkpoint is left to go on from ({'; '.join(self._wrong)}): put a whole copy there, or start anew "
                    "with another --out"
                )
            )
            return
        log.warning("%s is passed over: %s; %s is tried", torn.name, why, older.name)
        try:
            self.use(older)
        except CheckpointError as error:
            self._pass_over(str(error))
