"""Ships a stage's captured weights to the anchor: packed off the hot path, in parts, from where the last stream broke off.

One snapshot is under way at a time and one more may wait, the newest; nothing here is waited for by a tick. What the
anchor has is what it says it has (SNAPSHOT_HELD), also after it was restarted. No correction is known here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from codec import weight_delta
from swarm_core.wire.corrections import digest_of, slice_message
from swarm_core.wire.messages import FrameKind, Slice, Snapshot, SnapshotHeld
from swarm_worker.correcting import Capture

PART_BYTES = 1 << 20  # one chunk of a frame, so that reports pass between two parts
IN_FLIGHT = 4  # parts posted and not yet acknowledged: 4 MB keep 100 Mbit/s busy over 300 ms
log = logging.getLogger(__name__)
Post = Callable[[FrameKind, Snapshot | Slice, int], None]


@dataclass
class _UnderWay:
    capture: Capture
    base: int
    packet: bytes
    digest: bytes
    held: int = 0  # bytes that the anchor has
    posted: int = 0


class SnapshotShipper:
    """One stage's snapshots, in order. `offer` and `held` are called from the event loop and return at once."""

    def __init__(self, post: Post, vocab: int) -> None:
        self._post = post
        self._vocab = vocab
        self._waiting: Capture | None = None
        self._now: _UnderWay | None = None
        self._base: tuple[int, list[Tensor]] | None = None  # the newest version that the anchor holds whole
        self._wake = asyncio.Event()
        self.skipped = 0  # snapshots that a newer one overtook before they left

    def offer(self, capture: Capture) -> None:
        """Ship this one next. One that still waits is overtaken: its correction would come later and be older."""
        if self._waiting is not None:
            self.skipped += 1
            log.info("snapshot %d is overtaken by %d before it left", self._waiting.version, capture.version)
        self._waiting = capture
        self._wake.set()

    def held(self, message: SnapshotHeld) -> None:
        """What the anchor says of a snapshot."""
        now = self._now
        if now is None or message.version != now.capture.version:
            return
        if message.refused:
            log.warning("snapshot %d was refused: %s", message.version, message.refused)
            # A refused delta goes again whole; what is refused whole is given up.
            self._now = None
            if now.base and self._waiting is None:
                self._waiting = now.capture
            self._base = None
        elif message.whole:
            self._base, self._now = (now.capture.version, now.capture.weights), None
        else:
            now.held = message.bytes
            if not now.held <= now.posted <= now.held + IN_FLIGHT * PART_BYTES:
                now.posted = now.held  # the anchor has lost parts, or came back with less than it had
        self._wake.set()

    def resume(self) -> None:
        """The stream to the anchor is a new one: what was in flight is lost. Its answer to the next part tells the rest."""
        if self._now is not None:
            self._now.posted = self._now.held
            self._wake.set()

    async def run(self) -> None:
        """Pack and post until cancelled."""
        while True:
            if self._now is None and self._waiting is not None:
                capture, self._waiting = self._waiting, None
                self._announce(capture)
                version, base = self._base or (0, None)
                packet = await asyncio.to_thread(weight_delta.encode, capture.weights, base)
                self._now = _UnderWay(capture, version, packet, await asyncio.to_thread(digest_of, packet))
            self._post_parts()
            self._wake.clear()
            await self._wake.wait()

    def _announce(self, capture: Capture) -> None:
        """First what is small: the slice from stage 0, its log-probs from the last stage."""
        if capture.slice is None and capture.scored is None:
            return
        message = slice_message(capture.slice, capture.scored, self._vocab)
        message.version, message.tick, message.lineage = capture.version, capture.tick, capture.lineage
        message.basis_version, message.reuse = capture.basis_version, capture.pass_
        self._post(FrameKind.SLICE, message, capture.tick)

    def _post_parts(self) -> None:
        now = self._now
        if now is None:
            return
        while now.posted < len(now.packet) and now.posted < now.held + IN_FLIGHT * PART_BYTES:
            part = now.packet[now.posted : now.posted + PART_BYTES]
            c = now.capture
            message = Snapshot(c.version, c.tick, c.lineage, now.base, len(now.packet), now.posted, part, now.digest)
            now.posted += len(part)
            self._post(FrameKind.SNAPSHOT, message, c.tick)
