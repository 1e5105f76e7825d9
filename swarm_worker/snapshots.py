"""Ships a stage's captured weights to the anchor: packed off the hot path, in parts, from where the last stream broke off.

One snapshot is under way at a time and one more may wait; nothing here is waited for by a tick. What the anchor has is
what it says it has (SNAPSHOT_HELD), also after it was restarted. No correction is known here.
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
    weights: list[Tensor]  # as they travel
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

    def offer(self, capture: Capture) -> None:
        """Ship this one next, or the one that waits already: the stages must agree without a word, as a replay needs the
        same version of all of them. So it is the one that more powers of two divide, and of two alike the newer."""
        if self._waiting is not None:
            capture, left = sorted((capture, self._waiting), key=lambda c: (c.version & -c.version, c.version))[::-1]
            log.info("snapshot %d is passed over: %d goes next", left.version, capture.version)
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
            self._base, self._now = (now.capture.version, now.weights), None
        else:
            lost = message.bytes < now.held or message.bytes > len(now.packet)  # it came back with less than it had
            now.held = min(message.bytes, len(now.packet))
            if lost or not now.held <= now.posted <= now.held + IN_FLIGHT * PART_BYTES:
                now.posted = now.held
        self._wake.set()

    def resume(self) -> None:
        """The stream to the anchor is a new one: what was in flight is lost. Its answer to the next part tells the rest."""
        if self._now is not None:
            self._announce(self._now.capture)
            self._now.posted = min(self._now.held, len(self._now.packet) - 1)  # at least one part, to be answered
            self._wake.set()

    async def run(self) -> None:
        """Pack and post until cancelled."""
        while True:
            if self._now is None and self._waiting is not None:
                capture, self._waiting = self._waiting, None
                self._announce(capture)
                self._now = await asyncio.to_thread(self._packed, capture, *(self._base or (0, None)))
            self._post_parts()
            self._wake.clear()
            await self._wake.wait()

    def _packed(self, capture: Capture, version: int, base: list[Tensor] | None) -> _UnderWay:
        weights = capture.rounded()
        packet = weight_delta.encode(weights, base)
        return _UnderWay(capture, weights, version, packet, digest_of(packet))

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
