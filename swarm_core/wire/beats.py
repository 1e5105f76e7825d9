"""Signs of life on one stream: beats and warm frames out, what the peer says of itself and the judge of its silence in.

A BEAT goes out every second, whatever else does: epoch and tick, what its sender waits for, and a stamp whose echo tells
the round trip. Between two machines an empty WARM frame goes out besides whenever nothing was sent for 200 ms. Any
message is a sign of life. No stream is opened or closed here: a reader of a silent peer is told, and deals with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swarm_core.wire.errors import Silent, WireError
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.messages import Beat, FrameKind, from_bytes, to_bytes
from swarm_core.wire.silence import Silence

if TYPE_CHECKING:
    from swarm_core.wire.streams import FrameStream

BEAT_S = 1.0  # a frozen peer is noticed after a few of them
# TCP forgets an idle connection's window after its retransmission timeout: 200 ms at least, and a round trip more.
KEEP_WARM_S = 0.2
LOOK_S = 0.25  # between two looks at the judge; a look that comes late excuses the peer for as long
log = logging.getLogger(__name__)


@dataclass
class Pulse:
    """What a process says of itself in its beats. One for all its streams; whoever knows better replaces the parts."""

    phase: str = ""
    stands: Callable[[], tuple[int, int]] = lambda: (0, 0)  # epoch and tick
    awaits: Callable[[], tuple[str, float]] = lambda: ("", 0.0)  # what, and for how many seconds


class Heart:
    """The signs of life of one stream. Idle until `start`; `stop` ends both sending and judging."""

    def __init__(self, stream: FrameStream) -> None:
        self.last: Beat | None = None  # of the peer
        self.last_header: Header | None = None
        self.came_at = time.monotonic()  # any message of the peer
        self.judge: Silence | None = None
        self._stream = stream
        self._pulse = Pulse()
        self._heard = (0.0, 0.0)  # stamp of the peer's newest beat, and when it came
        self._patience: asyncio.Timeout | None = None
        self._words = ""
        self._over: asyncio.Future[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, pulse: Pulse, until: asyncio.Future[Any] | None = None, *, every_s: float = BEAT_S) -> None:
        """Beat and judge from now on, until `stop`, or until `until` is done."""
        self._pulse, self._over = pulse, asyncio.get_running_loop().create_future()
        self.judge = Silence(self._stream.peer, far=not self._stream.loopback)
        if self._patience is not None:
            self.judge.wait(time.monotonic())
        self._tasks = [asyncio.create_task(self._beat(every_s)), asyncio.create_task(self._look(self.judge))]
        if until is not None:
            until.add_done_callback(lambda _: self.stop())

    def stop(self) -> None:
        """Neither beat nor judge any more. A beat on its way out is not torn: that would tear the stream."""
        if self._over is not None and not self._over.done():
            self._over.set_result(None)
            self._tasks[1].cancel()

    # In ----------------------------------------------------------------------------------------------------------------

    async def read(self, reading: Awaitable[Any]) -> Any:
        """Wait for a message of the stream. Raises Silent when the peer has been silent for too long meanwhile."""
        if self.judge is not None:
            self.judge.wait(time.monotonic())
        try:
            async with asyncio.timeout(None) as self._patience:
                message = await reading
        except TimeoutError:
            raise Silent(self._words) from None
        finally:
            self._patience = None
        self.came_at = time.monotonic()
        if self.judge is not None:
            self.judge.came(self.came_at, len(message) if isinstance(message, bytes) else 0)
        return message

    def take(self, frame: Frame) -> None:
        """A BEAT of the peer. Raises BadFrame."""
        beat, now = from_bytes(Beat, frame.payload), time.monotonic()
        self.last, self.last_header, self._heard = beat, frame.header, (beat.said_s, now)
        if self.judge is not None:
            self.judge.arm()
            if beat.heard_s:
                self.judge.round_trip(now - beat.heard_s - beat.held_s)

    async def _look(self, judge: Silence) -> None:
        while True:
            planned = time.monotonic() + LOOK_S
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            judge.late(now - planned)
            if news := judge.news():
                log.info("%s", news)
            if self._patience is not None and (words := judge.verdict(now)):
                log.warning("%s", words)
                self._words = words
                self._patience.reschedule(asyncio.get_running_loop().time())
                return

    # Out ---------------------------------------------------------------------------------------------------------------

    async def _beat(self, every_s: float) -> None:
        assert self._over is not None
        stream, due = self._stream, time.monotonic()
        try:
            while True:
                now = time.monotonic()
                if stream.busy:  # what is being sent is a sign of life itself
                    wait_s = KEEP_WARM_S
                elif now >= due:
                    due = now + every_s
                    await stream.send_ahead(self._frame(now))
                    continue
                elif stream.loopback:
                    wait_s = due - now
                elif (idle_s := now - stream.sent_at) >= KEEP_WARM_S:
                    await stream.send_ahead(Frame(Header(FrameKind.WARM, tick=stream.sent_tick)))
                    continue
                else:
                    wait_s = min(due - now, KEEP_WARM_S - idle_s)
                await asyncio.wait({self._over}, timeout=wait_s)
                if self._over.done():
                    return
        except WireError:
            pass  # whoever reads or sends here is told

    def _frame(self, now: float) -> Frame:
        (epoch, tick), (awaits, awaits_s) = self._pulse.stands(), self._pulse.awaits()
        stamp, came = self._heard
        beat = Beat(now, stamp, now - came if came else 0.0, self._pulse.phase, awaits, awaits_s)
        return Frame(Header(FrameKind.BEAT, epoch=epoch, tick=tick), to_bytes(beat))
