"""A stage's end of the slow circuit: what it captures goes to the anchor, what comes back is checked and held. No tick waits here.

What is damaged, from another history or of another epoch is refused with its reason, in the log and in an event of the
run; ticks go on without it.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from swarm_core.wire.errors import BadFrame
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.messages import (
    Correction,
    FrameKind,
    Report,
    Slice,
    Snapshot,
    SnapshotHeld,
    from_bytes,
    to_bytes,
)
from swarm_worker.anchor_link import AnchorLink
from swarm_worker.compute_thread import ComputeThread
from swarm_worker.correcting import Capture, CorrectionRefused
from swarm_worker.redo import Kind, Record
from swarm_worker.snapshots import SnapshotShipper

log = logging.getLogger(__name__)


class SlowCircuit:
    """Of one stage; idle in a run without a merger."""

    def __init__(self, anchor: AnchorLink, work: ComputeThread, run_id: int, vocab: int) -> None:
        self._anchor, self._work, self._run_id = anchor, work, run_id
        self._correcting = work.compute.correcting
        self._stage = work.compute.span.stage
        self._shipper = SnapshotShipper(self._post, vocab)

    @property
    def held(self) -> dict[int, tuple[int, int]]:
        """The corrections that this stage could merge: (snapshot tick, first tick to merge it in) by version."""
        return self._correcting.held if self._correcting is not None else {}

    def resume(self) -> None:
        """The stream to the anchor is a new one: what was under way is lost."""
        self._shipper.resume()

    async def run(self) -> None:
        """Ship until cancelled."""
        await self._shipper.run()

    def offer(self, capture: Capture | None) -> None:
        """What the last tick left for the anchor, if anything."""
        if capture is not None:
            self._shipper.offer(capture)

    async def take(self, frame: Frame) -> None:
        """A SNAPSHOT_HELD or CORRECTION of the anchor."""
        try:
            if frame.header.kind is FrameKind.SNAPSHOT_HELD:
                self._shipper.held(from_bytes(SnapshotHeld, frame.payload))
                return
            correction = await self._checked(frame)
        except (CorrectionRefused, BadFrame) as error:
            log.warning("stage %d: %s", self._stage, error)
            words = {"event": "correction_refused", "message": f"stage {self._stage}: {error}"}
            self._anchor.post_report(Report(type="event", tick=self._work.position.tick, words=words))
        else:
            if correction is not None and self._correcting is not None:
                record = Record(Kind.CORRECTION, to_bytes(correction))
                self._work.deliver(partial(self._correcting.hold, correction), record)

    async def _checked(self, frame: Frame) -> Correction | None:
        """A correction that the compute thread is to hold; None for one that it holds already. Raises if it is bad."""
        message, epoch = from_bytes(Correction, frame.payload), self._work.position.epoch
        if self._correcting is None:
            raise CorrectionRefused("a correction came, but this run has no merger")
        if frame.header.epoch != epoch:
            raise CorrectionRefused(
                f"correction {message.version} is of epoch {frame.header.epoch}, this run is in epoch {epoch}"
            )
        if message.version in self.held:
            return None  # said again after an outage
        await asyncio.to_thread(self._correcting.check, message)  # decoding takes a while, and frames must not wait
        return message

    def _post(self, kind: FrameKind, message: Snapshot | Slice, tick: int) -> None:
        header = Header(kind, self._run_id, self._work.position.epoch, tick)
        self._anchor.post(Frame(header, to_bytes(message)))
