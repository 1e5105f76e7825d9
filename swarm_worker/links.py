"""A stream to a neighbour with a queue in front of it: posting never blocks, sending happens in its own task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from swarm_core.wire.frames import Frame
from swarm_core.wire.streams import FrameStream


class Outbox:
    """Frames leave in the order they were posted. What is queued is bounded by the schedule: 1F1B and its credit."""

    def __init__(self, stream: FrameStream) -> None:
        self.stream = stream
        self._queue: asyncio.Queue[tuple[Frame, Callable[[], None] | None]] = asyncio.Queue()

    def post(self, frame: Frame, sent: Callable[[], None] | None = None) -> None:
        """Queue a frame; `sent` is called once the stream has taken it."""
        self._queue.put_nowait((frame, sent))

    async def run(self) -> None:
        """Send until cancelled. Raises what the stream raises."""
        while True:
            frame, sent = await self._queue.get()
            await self.stream.send(frame)
            self._queue.task_done()
            if sent is not None:
                sent()

    async def flush(self) -> None:
        """Wait until everything posted has been sent."""
        await self._queue.join()
