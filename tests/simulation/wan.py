"""Streams of frames between simulated processes, as TCP keeps them: in order, whole, or broken. No clock but the loop's.

A message that is lost for good breaks its stream, and each end hears of that in its own time. What an application may say
twice is said twice here, at any later moment of the stream. A partition holds one direction up; streams that it holds up
for long break, and nobody can dial through it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from virtual_loop import CURRENT, Process, VirtualLoop

from swarm_core.wire.door import Door
from swarm_core.wire.errors import BadFrame, PeerLost, Refused, Unreachable, WireError
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import FrameKind, Hello, Report, from_bytes
from swarm_core.wire.pacing import NO_LIMITS
from swarm_core.wire.streams import FrameStream

SILENCE_S = 15.0  # until keepalive gives a silent peer up
SAID_TWICE = {
    FrameKind.FENCE,
    FrameKind.HELD,
    FrameKind.START,
    FrameKind.REPORT,
    FrameKind.SAVED,
    FrameKind.BOOKED,
}


@dataclass
class Weather:
    """What the network does to messages."""

    loss: float = 0.0
    twice: float = 0.0
    quiet: float = 0.0  # share of closed streams whose other end finds out by silence
    most_delay_s: float = 0.3
    slow: float = 0.0  # share of messages that take up to `most_delay_s`; the others a hundredth of it


class End:
    """One end of a connection."""

    def __init__(self, wan: Wan, process: Process) -> None:
        self.wan, self.process = wan, process
        self.peer: End
        self.inbox: deque[Frame | None | WireError] = deque()
        self.frozen: list[Frame | None | WireError] = []  # arrived at a process that stands still
        self.waiter: asyncio.Future[None] | None = None
        self.error: WireError | None = None  # known to this end
        self.cut = False  # nothing gets through any more, known or not
        self.arrival = 0.0
        self.handler: asyncio.Task[Any] | None = None  # of the serving end

    def send(self, item: Frame | None | WireError) -> None:
        if self.error is not None:
            raise PeerLost(str(self.error))
        if not self.process.alive:
            return
        self._post(item)
        kind = item.header.kind if isinstance(item, Frame) else None
        if kind in SAID_TWICE and self.wan.rng.random() < self.wan.weather.twice:
            self.wan.loop.call_later(5.0 * self.wan.rng.random(), self._again, item)

    def _again(self, item: Frame) -> None:
        if self.error is None and self.process.alive:
            self.wan.happened("said twice")
            self._post(item)

    def _post(self, item: Frame | None | WireError) -> None:
        wan = self.wan
        if wan.rng.random() < wan.weather.loss:
            wan.happened("lost")
            self.wan.break_(self)
            return
        when = max(
            self.arrival, wan.loop.now + wan.delay_s(), wan.blocked_until(self.process.host, self.peer.process.host)
        )
        self.arrival = when + 1e-6
        wan.loop.call_at(when, self.peer.take, item)

    def take(self, item: Frame | None | WireError) -> None:
        """Something arrives here."""
        if self.cut or self.error is not None or not self.process.alive:
            return
        self.frozen.append(item)
        self._thaw()

    def _thaw(self) -> None:
        if self.process.frozen_until > self.wan.loop.now:
            self.wan.loop.call_at(self.process.frozen_until + 1e-6, self._thaw)
            return
        self.inbox.extend(self.frozen)
        self.frozen.clear()
        self._wake()

    def hears(self, error: WireError) -> None:
        """This end learns that the stream is broken. What has arrived can still be read."""
        if self.error is None and self.process.alive:
            self.error = error
            self._wake()
            # gRPC ends the call of a serving end beside its reading, now one first and now the other.
            if self.handler is not None and self.wan.rng.random() < 0.5:
                self.handler.cancel()

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def receive(self) -> Frame | None:
        while not self.inbox:
            if self.error is not None:
                if self.handler is not None:  # how a serving end sees it
                    return None
                raise self.error
            self.waiter = self.wan.loop.create_future()
            await self.waiter
        item = self.inbox.popleft()
        if isinstance(item, WireError):
            self.error = item
            raise item
        return item


class _NoHeart:
    """In place of beats: here who is silent is given up by the streams themselves."""

    came_at, judge, last, last_header = 0.0, None, None, None

    def start(self, *_: Any, **__: Any) -> None: ...
    def stop(self) -> None: ...


class Stream(FrameStream):
    """The real one's interface; frames travel whole."""

    def __init__(self, end: End, ledger: Ledger, peer: str) -> None:
        super().__init__(None, None, ledger, peer)  # type: ignore[arg-type]
        self.loopback = True  # no window to keep warm
        self.heart = _NoHeart()  # type: ignore[assignment]
        self.end = end
        self.hello: Hello | None = None  # that came first

    async def send(self, frame: Frame, *, count: bool = True) -> None:
        await asyncio.sleep(0)
        self.end.send(Frame(frame.header, bytes(frame.payload), frame.dense_bytes))

    async def send_report(self, report: Report, tick: int) -> None:
        payload = self._ledger.take_report(report, tick, self.link, self.direction)
        await self.send(Frame(Header(FrameKind.REPORT, tick=tick), payload))

    async def receive(self) -> Frame | None:
        frame = await self.end.receive()
        if frame is not None and frame.header.kind is FrameKind.HELLO:
            self.hello = from_bytes(Hello, frame.payload)
        return frame

    async def done(self) -> None:
        self.end.send(None)

    async def finish(self, wait_s: float = 5.0) -> None:
        try:
            await self.done()
            async with asyncio.timeout(wait_s):
                while await self.receive() is not None:
                    pass
        except (WireError, TimeoutError):
            pass
        await self.close()

    async def close(self) -> None:
        self.end.wan.close(self.end)


class Server:
    """In place of the real one; an address is a number of the process."""

    def __init__(
        self, service: str, handlers: dict[str, Callable[[FrameStream], Awaitable[None]]], ledger: Ledger
    ) -> None:
        process = CURRENT.get()
        assert process is not None
        self.process, self.ledger, self.limits = process, ledger, NO_LIMITS
        self.handlers = {f"{service}/{name}": handler for name, handler in handlers.items()}
        self.wan: Wan = Wan.here
        self.identity, self.trusted_network, self.door = None, True, Door()

    async def start(self, listen: str) -> str:
        return self.wan.listen(self, listen)

    async def stop(self) -> None:
        self.wan.servers = {a: s for a, s in self.wan.servers.items() if s is not self}

    async def serve(self, end: End, method: str) -> None:
        try:
            await self.handlers[method](Stream(end, self.ledger, end.peer.process.name))
            with_error: WireError | None = None
        except Refused as error:
            if isinstance(error, BadFrame):  # a strike, and here all are honest
                self.wan.objection(f"{self.process.name} refuses {end.peer.process.name}: {error}", error)
            with_error = type(error)(str(error))
        except PeerLost:
            with_error = PeerLost("the other end gave up")
        except Exception as error:  # noqa: BLE001  whatever it is, it is an objection
            self.wan.objection(f"{self.process.name}: {method} failed with {type(error).__name__}: {error}", error)
            return
        if end.error is None and end.process.alive:
            end.send(with_error)


class Wan:
    """All connections. One at a time: servers find it by `here`."""

    here: Wan

    def __init__(self, loop: VirtualLoop, happened: Callable[[str], None], objection: Callable[..., None]) -> None:
        self.loop, self.rng, self.happened, self.objection = loop, loop.rng, happened, objection
        self.weather = Weather()
        self.servers: dict[str, Server] = {}
        self.ends: dict[End, None] = {}
        self._blocked: dict[tuple[str, str], float] = {}
        self._ports = 7000
        Wan.here = self

    def delay_s(self) -> float:
        most = self.weather.most_delay_s
        return most * self.rng.random() * (1.0 if self.rng.random() < self.weather.slow else 0.01)

    # Partitions ----------------------------------------------------------------------------------------------------------

    def blocked_until(self, sender: str, receiver: str) -> float:
        return self._blocked.get((sender, receiver), 0.0)

    def partition(self, sender: str, receiver: str, seconds: float) -> None:
        """Hold one direction up. What has long waited for an answer is given up by both ends, each in its own time."""
        self._blocked[sender, receiver] = self.loop.now + seconds
        for end in list(self.ends):
            if (end.process.host, end.peer.process.host) == (sender, receiver):
                patience = SILENCE_S * self.rng.uniform(0.3, 1.0)
                if patience < seconds:
                    self.loop.call_later(patience, self.break_, end)

    def heal(self) -> None:
        self.weather = Weather()
        self._blocked.clear()

    # Connections -----------------------------------------------------------------------------------------------------------

    def listen(self, server: Server, listen: str) -> str:
        if listen.endswith(":0"):
            self._ports += 1
            listen = f"{listen[:-2]}:{self._ports}"
        self.servers[listen] = server
        return listen

    def break_(self, end: End) -> None:
        """A stream is broken; both ends learn it later."""
        for one in (end, end.peer):
            if not one.cut:
                one.cut = True
                self.loop.call_later(5.0 * self.rng.random() ** 3, one.hears, PeerLost("the stream broke"))
        self._forget(end)

    def close(self, end: End) -> None:
        """One end has left it; the other learns it behind what is under way."""
        if end.error is None:
            end.error = PeerLost("closed here")
            end._wake()
            when = max(end.arrival, self.loop.now + self.delay_s())
            if self.rng.random() < self.weather.quiet:
                when += SILENCE_S * self.rng.random()
            self.loop.call_at(when, end.peer.hears, PeerLost("the other end closed the stream"))
        self._forget(end)

    def _forget(self, end: End) -> None:
        self.ends.pop(end, None)
        self.ends.pop(end.peer, None)

    def died(self, process: Process, silent: bool) -> None:
        """A process is gone: its kernel says so, unless the machine went with it."""
        self.servers = {a: s for a, s in self.servers.items() if s.process is not process}
        for end in list(self.ends):
            if end.process is process:
                end.peer.cut = silent
                wait_s = SILENCE_S * self.rng.random() if silent else self.delay_s()
                self.loop.call_later(wait_s, end.peer.hears, PeerLost(f"{process.name} is gone"))
                self._forget(end)

    def froze(self, process: Process, seconds: float) -> None:
        """Its peers give it up if that takes too long."""
        for end in list(self.ends):
            if end.process is process and seconds > SILENCE_S:
                self.loop.call_later(SILENCE_S * self.rng.uniform(0.6, 1.0), self.break_, end)

    async def dial(
        self, address: str, method: str, ledger: Ledger, who: str, wait_s: float, *_: Any, **__: Any
    ) -> Stream:
        process = CURRENT.get()
        assert process is not None
        until = self.loop.now + wait_s
        while True:
            await asyncio.sleep(2 * self.delay_s() + 1e-4)
            server = self.servers.get(address)
            if server is not None and server.process.alive and server.process.frozen_until <= self.loop.now:
                hosts = process.host, server.process.host
                if max(self.blocked_until(*hosts), self.blocked_until(*reversed(hosts))) <= self.loop.now:
                    return self._connect(process, server, method, ledger, f"{who} at {address}")
            if self.loop.now >= until:
                raise Unreachable(who, address, wait_s)
            await asyncio.sleep(0.25)

    def _connect(self, process: Process, server: Server, method: str, ledger: Ledger, peer: str) -> Stream:
        mine, theirs = End(self, process), End(self, server.process)
        mine.peer, theirs.peer = theirs, mine
        self.ends[mine] = self.ends[theirs] = None
        theirs.handler = server.process.spawn(server.serve(theirs, method))
        return Stream(mine, ledger, peer)
