"""A queue in front of a stream: posting never blocks, sending happens in its own task, in the order of posting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from swarm_core.wire.frames import Frame
from swarm_core.wire.messages import Report
from swarm_core.wire.streams import FrameStream

Sent = Callable[[], None]
LIMIT_BYTES = 64 << 20  # of payloads: several of the largest packets, and little beside the weights of a stage


class Outbox:
    """Bounded in bytes by those who make bulk: they wait for `room()` before they make more.

    Posting itself always succeeds, so a control frame never waits for room, and neither does a reader that posts: reading
    never stops for writing. What is queued is below `limit_bytes` plus one frame of each producer, control apart. On a link
    the one producer is the compute thread; whoever reads the other end waits only for its own computing, and the last stage
    computes without sending down, so room always comes. The schedule's credit is the finer bound: so many activations
    queued, whatever their size; 1F1B limits the gradients in the same way, and batches and bases come one at a time.
    """

    def __init__(self, stream: FrameStream, limit_bytes: int = LIMIT_BYTES) -> None:
        self.stream = stream
        self.limit_bytes = limit_bytes
        self.queued_bytes = 0  # payloads posted and not yet taken by the stream
        self._queue: asyncio.Queue[tuple[Frame | Report, Sent | None]] = asyncio.Queue()
        self._room = asyncio.Event()
        self._room.set()

    def post(self, frame: Frame, sent: Sent | None = None) -> None:
        """Queue a frame; `sent` is called once the stream has taken it."""
        self._queue.put_nowait((frame, sent))
        self._queued(memoryview(frame.payload).nbytes)

    def post_report(self, report: Report) -> None:
        """Queue a report; it takes the ledger's rows with it when its turn comes."""
        self._queue.put_nowait((report, None))

    async def room(self) -> None:
        """Wait until less than `limit_bytes` are queued. For makers of bulk; cancel it when the stream is gone."""
        await self._room.wait()

    async def run(self) -> None:
        """Send until cancelled. Raises what the stream raises."""
        while True:
            item, sent = await self._queue.get()
            if isinstance(item, Report):
                await self.stream.send_report(item, item.tick)
            else:
                await self.stream.send(item)
                self._queued(-memoryview(item.payload).nbytes)
            self._queue.task_done()
            if sent is not None:
                sent()

    async def flush(self) -> None:
        """Wait until everything posted has been sent."""
        await self._queue.join()

    def _queued(self, n: int) -> None:
        self.queued_bytes += n
        if self.queued_bytes < self.limit_bytes:
            self._room.set()
        else:
            self._room.clear()
