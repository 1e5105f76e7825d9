"""A queue in front of a stream: posting never blocks, sending happens in its own task, in the order of posting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from swarm_core.wire.frames import Frame
from swarm_core.wire.messages import Report
from swarm_core.wire.streams import FrameStream

Sent = Callable[[], None]


class Outbox:
    """What is queued is bounded by who posts: activations by the schedule's credit, gradients by the neighbour's 1F1B,
    batches and bases by coming one at a time."""

    def __init__(self, stream: FrameStream) -> None:
        self.stream = stream
        self._queue: asyncio.Queue[tuple[Frame | Report, Sent | None]] = asyncio.Queue()

    def post(self, frame: Frame, sent: Sent | None = None) -> None:
        """Queue a frame; `sent` is called once the stream has taken it."""
        self._queue.put_nowait((frame, sent))

    def post_report(self, report: Report) -> None:
        """Queue a report; it takes the ledger's rows with it when its turn comes."""
        self._queue.put_nowait((report, None))

    async def run(self) -> None:
        """Send until cancelled. Raises what the stream raises."""
        while True:
            item, sent = await self._queue.get()
            if isinstance(item, Report):
                await self.stream.send_report(item, item.tick)
            else:
                await self.stream.send(item)
            self._queue.task_done()
            if sent is not None:
                sent()

    async def flush(self) -> None:
        """Wait until everything posted has been sent."""
        await self._queue.join()
