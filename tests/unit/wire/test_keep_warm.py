"""Keeping a connection warm: an empty frame after each idle interval, counted, unseen by whoever reads, over when told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import grpc
import pytest

from swarm_core.wire.frames import FRAME_OVERHEAD, Assembler, Frame, Header
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import FrameKind
from swarm_core.wire.streams import FrameStream, Server, dial

EVERY_S = 0.02


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, timeout=20))


class Pipe:
    """A stream that keeps what is written and reads what it is given."""

    def __init__(self, inbound: tuple[Any, ...] = ()) -> None:
        self.ledger = Ledger()
        self.messages: list[bytes] = []
        self._inbound = iter(inbound)
        self.broken = False
        self.stream = FrameStream(self._read, self._write, self.ledger, "peer").name("a-b", "up")

    async def _write(self, message: bytes) -> None:
        if self.broken:
            raise asyncio.InvalidStateError
        self.messages.append(message)

    async def _read(self) -> Any:
        return next(self._inbound)

    @property
    def frames(self) -> list[Frame]:
        return [frame for message in self.messages if (frame := Assembler({}).feed(message)) is not None]


async def warmed(pipe: Pipe, frames: int) -> None:
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    warming = asyncio.create_task(pipe.stream.keep_warm(over, EVERY_S))
    while len(pipe.messages) < frames:
        await asyncio.sleep(EVERY_S / 4)
    over.set_result(None)
    await warming


def test_an_idle_stream_is_kept_warm_and_every_byte_is_in_the_ledger() -> None:
    pipe = Pipe()

    async def work() -> None:
        await pipe.stream.send(Frame(Header(FrameKind.GRADIENT, tick=7), b"1234", dense_bytes=8))
        await warmed(pipe, 4)

    run(work())
    first, *warm = pipe.frames
    assert first.header.kind is FrameKind.GRADIENT and {f.header.kind for f in warm} == {FrameKind.WARM}
    assert all(f.header.tick == 7 and len(f.payload) == 0 for f in warm)
    rows = {(row.kind, row.direction): row for row in pipe.ledger.take() if row.frames}
    assert rows["control", "up"].frames == len(warm) >= 3
    assert rows["control", "up"].message_bytes == len(warm) * FRAME_OVERHEAD
    assert rows["control", "up"].packet_bytes == 0 and rows["control", "up"].tick == 7
    assert sum(row.message_bytes for row in rows.values()) == sum(map(len, pipe.messages))


def test_a_busy_stream_needs_no_warming(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame in the middle of each wait: an interval is never over."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pipe = Pipe()

    async def work() -> None:
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def wait(_: Any, timeout: float) -> None:
            now[0] += timeout / 2
            await pipe.stream.send(Frame(Header(FrameKind.ACTIVATION), b"x"))
            now[0] += timeout / 2
            if len(pipe.messages) == 50:
                over.set_result(None)

        monkeypatch.setattr(asyncio, "wait", wait)
        await pipe.stream.keep_warm(over, EVERY_S)

    run(work())
    assert {frame.header.kind for frame in pipe.frames} == {FrameKind.ACTIVATION}


def test_a_send_that_takes_long_is_left_to_itself() -> None:
    pipe, turns = Pipe(), 0
    plain_wait = asyncio.wait

    async def work() -> None:
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        async with pipe.stream._lock:
            warming = asyncio.create_task(pipe.stream.keep_warm(over, 3600.0))
            for _ in range(20):
                await asyncio.sleep(0)
            assert turns == 1, "it sleeps instead of asking again and again"
            over.set_result(None)
        await warming

    async def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal turns
        turns += 1
        return await plain_wait(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "wait", counting)
        run(work())
    assert pipe.messages == []


def test_a_peer_that_is_gone_ends_it_quietly() -> None:
    pipe = Pipe()
    pipe.broken = True

    async def work() -> None:
        await pipe.stream.keep_warm(asyncio.get_running_loop().create_future(), 0.0)

    run(work())


def test_loopback_is_left_alone() -> None:
    pipe = Pipe()
    pipe.stream.loopback = True

    async def work() -> None:
        await pipe.stream.keep_warm(asyncio.get_running_loop().create_future(), 0.0)

    run(work())
    assert pipe.messages == []


def test_a_reader_never_sees_it() -> None:
    writer = Pipe()
    warm, vote = Frame(Header(FrameKind.WARM)), Frame(Header(FrameKind.VOTE), b"ready")

    async def work() -> None:
        for frame in (warm, Frame(Header(FrameKind.WARM), bytes(1000)), vote, warm, warm):
            await writer.stream.send(frame)
        reader = Pipe((*writer.messages, grpc.aio.EOF)).stream
        assert await reader.expect(FrameKind.VOTE) == vote
        assert await reader.receive() is None

    run(work())


def test_both_ends_of_a_real_link_know_that_it_is_loopback() -> None:
    ends: list[bool] = []

    async def serve(stream: FrameStream) -> None:
        ends.append(stream.loopback)

    async def work() -> None:
        for host in ("127.0.0.1", "[::1]"):
            server = Server("Stage", {"Link": serve}, Ledger())
            address = await server.start(f"{host}:0")
            stream = await dial(address, "Stage/Link", Ledger(), "stage 1", 5.0)
            assert await stream.receive() is None
            ends.append(stream.loopback)
            await stream.finish()
            await server.stop()

    run(work())
    assert ends == [True] * 4
