"""The slow loop at the anchor's streams: sketches, snapshots and slices in, bases and corrections out. Decides nothing.

The keeper makes bases and the corrector corrections; here is who gets them, in which form, and what is kept so that a
restarted anchor carries on. Samplers get bases alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from anchor_node.calibrator import MOMENT, BasisKeeper, part_for_stage
from anchor_node.corrector import Corrector
from anchor_node.memory import keep_bases
from anchor_node.replay_bases import ReplayBases
from codec.fit import Fit
from codec.spec import Direction
from swarm_core.wire.bases import Key
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.messages import Correction, FrameKind, Sketch, Slice, Snapshot, from_bytes
from swarm_core.wire.outbox import Outbox

if TYPE_CHECKING:
    from anchor_node.service import AnchorService


log = logging.getLogger(__name__)
SLICE_LIMIT = 256 << 20  # a few million tokens
BESIDE_BYTES = 1 << 10  # of a sketch, beside its numbers


class SlowLoop:
    """One run's. `keeper` and `corrector` come before the anchor opens, where the run has any."""

    def __init__(self, anchor: AnchorService) -> None:
        self._anchor = anchor
        self.keeper: BasisKeeper | None = None
        self.keeper_at_start: BasisKeeper | None = None  # in place of it, when the members of a run at work come anew
        self.corrector: Corrector | None = None
        self._bases_sent: WeakKeyDictionary[Outbox, int] = WeakKeyDictionary()  # the last version posted to a member
        self._taking: set[asyncio.Task[None]] = set()  # parts of snapshots; the last one takes a while

    def use(self, keeper: BasisKeeper | None) -> None:
        """From now on these bases; with `anchor.q_source = anchor_replay` refreshed by the corrector's replays."""
        self.keeper, config = keeper, self._anchor.manifest.config
        if self.corrector is not None and keeper is not None and config.anchor.q_source == "anchor_replay":
            cadence, links = config.anchor.q_cadence, config.links
            fit = (links.fit, links.fit_ridge, links.outliers)
            self.corrector.refresh = ReplayBases(keeper, cadence, *fit) if cadence else None

    def use_at_start(self, keeper: BasisKeeper) -> None:
        """The run will go on from another checkpoint than was thought."""
        if self._anchor.memory.at_work:
            self.keeper_at_start = keeper
        else:
            self.use(keeper)

    def begin(self) -> None:
        """The run starts at the anchor's tick, with members that all come anew."""
        if self._anchor.memory.at_work:
            self.use(self.keeper_at_start)
        if self.keeper is not None:
            keep_bases(self._anchor.out, self.keeper.current)
        if self.corrector is not None:
            self.corrector.take_up(self._anchor.tick)

    def limits(self) -> dict[FrameKind, int]:
        """The largest SKETCH and SLICE of a stage, which is what it may send beyond a message of the usual size."""
        spec = self._anchor.manifest.link()
        most = max((spec.columns(direction) for direction in Direction), default=0)
        return {FrameKind.SKETCH: 2 * spec.width * most + BESIDE_BYTES, FrameKind.SLICE: SLICE_LIMIT}

    def take(self, stage: int, frame: Frame) -> None:
        """A SKETCH, SNAPSHOT or SLICE of a stage. Raises BadFrame for one that this run does not ask for."""
        if frame.header.kind is FrameKind.SKETCH:
            self._take_sketch(stage, from_bytes(Sketch, frame.payload))
        elif self.corrector is None:
            raise BadFrame(f"stage {stage} sent {frame.header.kind.name}; this run has no merger")
        elif frame.header.kind is FrameKind.SLICE:
            message = from_bytes(Slice, frame.payload)
            self.corrector.take_slice(stage, frame.header, self._anchor.roster.epoch, message)
        else:
            # Tasks run in the order of the frames; the last part of a snapshot is decoded on a thread.
            part = from_bytes(Snapshot, frame.payload)
            task = asyncio.create_task(self._take_snapshot(self.corrector, stage, frame.header, part))
            self._taking.add(task)
            task.add_done_callback(self._taking.discard)
            task.add_done_callback(self.ended)

    def ended(self, task: asyncio.Task[None]) -> None:
        """Work on corrections has ended. Where it raises it is our fault, and no reason to end a run."""
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            log.error("corrections", exc_info=error)
            self._anchor.event("corrections_failed", f"{type(error).__name__}: {error}")

    # Bases -------------------------------------------------------------------------------------------------------------

    def _take_sketch(self, stage: int, sketch: Sketch) -> None:
        if self.keeper is None or self._anchor.manifest.config.anchor.q_source != "stage_sketch":
            raise BadFrame("a sketch came, but no basis of these links is made of sketches")
        # Of what it sends: activations at the boundary behind it, gradients at the one before it, and their metric.
        sends_rows = sketch.matrix.direction == Direction.FORWARD and sketch.part == MOMENT
        if stage != sketch.matrix.boundary + (not sends_rows):
            raise BadFrame(f"stage {stage} sent a sketch of boundary {sketch.matrix.boundary} that is not its own")
        self._anchor.check_tick(sketch.tick, f"a sketch of stage {stage}")
        if self.keeper.add(sketch) is None:
            return
        self._send_bases(self.keeper)
        for (boundary, direction), decision in self.keeper.decisions.items():
            if decision.why:
                self._anchor.event("steering", f"boundary {boundary} {direction.name.lower()}: {decision.why}")

    def adopt_bases(self, tick: int, fits: Mapping[Key, Fit]) -> None:
        """Pairs that a replay of that tick has given (anchor.q_source = anchor_replay)."""
        if self.keeper is not None and self.keeper.adopt(tick, fits) is not None:
            self._send_bases(self.keeper)

    def _send_bases(self, keeper: BasisKeeper) -> None:
        """The keeper has a new version: onto the volume, to all stages and samplers, and into the books."""
        keep_bases(self._anchor.out, keeper.current)
        for stage, box in self._anchor.stages.items():
            self.post_bases(box, stage)
        for box in self._anchor.samplers.boxes.values():
            self.post_bases(box)
        lowest = min(keeper.overlap.values())
        text = f"version {keeper.version}, overlap with the last one >= {lowest:.3f}"
        self._anchor.event("basis", text, keeper.numbers())

    def post_bases(self, box: Outbox, stage: int | None = None) -> None:
        """The newest version, or a stage's part of it: as changes to whoever was sent the version before."""
        if self.keeper is None:
            return
        bases, changes = self.keeper.current, self.keeper.changes
        if changes is not None and changes.delta and changes.base == self._bases_sent.get(box):
            bases = changes
        self._bases_sent[box] = bases.version
        self._anchor.post(box, FrameKind.BASIS, bases if stage is None else part_for_stage(bases, stage))

    def post_bases_to_newcomer(self, box: Outbox, stage: int) -> None:
        """To a stage that takes the place of a lost one: it has none of what was broadcast."""
        if box not in self._bases_sent:
            self.post_bases(box, stage)

    def post_bases_beyond(self, version: int, box: Outbox, stage: int | None) -> None:
        """To a member that is back and holds `version`: the newest, if it is newer."""
        if self.keeper is not None and version < self.keeper.version:
            self.post_bases(box, stage)

    # Corrections -------------------------------------------------------------------------------------------------------

    async def _take_snapshot(self, corrector: Corrector, stage: int, header: Header, message: Snapshot) -> None:
        held = await corrector.take_snapshot(stage, header, self._anchor.roster.epoch, message)
        if stage in self._anchor.stages:
            self._anchor.post(self._anchor.stages[stage], FrameKind.SNAPSHOT_HELD, held)

    def send_correction(self, stage: int, correction: Correction) -> None:
        """A correction for a stage; one that is away gets the newest when it comes back."""
        if stage in self._anchor.stages:
            self._anchor.post(self._anchor.stages[stage], FrameKind.CORRECTION, correction)

    def post_corrections(self, stage: int) -> None:
        """To a stage that starts or is back: the corrections that may still be merged."""
        for correction in self.corrector.pending(stage) if self.corrector is not None else []:
            self.send_correction(stage, correction)
