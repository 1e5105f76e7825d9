"""Signs of life: beats and warm frames, counted, unseen by whoever reads, over when told; and the silence of a peer that froze."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest

from swarm_core.wire import beats, silence
from swarm_core.wire.beats import Pulse
from swarm_core.wire.errors import PeerLost, Silent
from swarm_core.wire.frames import Assembler, Frame, Header
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import Beat, FrameKind, from_bytes, to_bytes
from swarm_core.wire.streams import FrameStream, Server, dial

WARM_S = 0.02


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


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beats, "KEEP_WARM_S", WARM_S)


async def beating(pipe: Pipe, frames: int, every_s: float = 3600.0) -> None:
    pulse = Pulse("at work", lambda: (2, 7), lambda: ("the vote of stage 1", 1.5))
    pipe.stream.heart.start(pulse, every_s=every_s)
    while len(pipe.messages) < frames:
        await asyncio.sleep(WARM_S / 4)
    pipe.stream.heart.stop()
    await asyncio.gather(*pipe.stream.heart._tasks, return_exceptions=True)


def test_a_beat_says_where_its_sender_stands_and_an_idle_stream_is_kept_warm() -> None:
    """And every byte is in the ledger."""
    pipe = Pipe()

    async def work() -> None:
        await pipe.stream.send(Frame(Header(FrameKind.GRADIENT, tick=7), b"1234", dense_bytes=8))
        await beating(pipe, 5)

    run(work())
    first, beat, *warm = pipe.frames
    assert first.header.kind is FrameKind.GRADIENT and {f.header.kind for f in warm} == {FrameKind.WARM}
    assert all(f.header.tick == 7 and len(f.payload) == 0 for f in warm) and len(warm) >= 3
    assert beat.header == Header(FrameKind.BEAT, epoch=2, tick=7)
    said = from_bytes(Beat, beat.payload)
    assert (said.phase, said.awaits, said.awaits_s) == ("at work", "the vote of stage 1", 1.5)
    rows = {(row.kind, row.direction): row for row in pipe.ledger.take() if row.frames}
    assert rows["beat", "up"].frames == 1 + len(warm) and rows["beat", "up"].tick == 7
    assert sum(row.message_bytes for row in rows.values()) == sum(map(len, pipe.messages))


def test_loopback_beats_and_is_not_kept_warm() -> None:
    pipe = Pipe()
    pipe.stream.loopback = True

    async def work() -> None:
        await beating(pipe, 4, every_s=WARM_S)

    run(work())
    assert [frame.header.kind for frame in pipe.frames] == [FrameKind.BEAT] * 4


def test_a_stream_that_sends_is_left_to_itself() -> None:
    pipe = Pipe()

    async def work() -> None:
        async with pipe.stream._lock:
            pipe.stream.heart.start(Pulse(), every_s=0.0)
            await asyncio.sleep(3 * WARM_S)
            assert pipe.messages == []
            pipe.stream.heart.stop()

    run(work())


def test_a_beat_on_its_way_out_is_counted_and_never_torn() -> None:
    """Tearing a write would tear the stream; and what a report counts must hold it, however the two meet."""
    pipe = Pipe()

    async def work() -> None:
        begun, go = asyncio.Event(), asyncio.Event()

        async def slow(message: bytes) -> None:
            begun.set()
            await go.wait()
            pipe.messages.append(message)

        pipe.stream._write = slow
        pipe.stream.heart.start(Pulse())
        await begun.wait()
        counted = sum(row.message_bytes for row in pipe.ledger.take())
        pipe.stream.heart.stop()
        go.set()
        await asyncio.gather(*pipe.stream.heart._tasks, return_exceptions=True)
        assert counted == sum(map(len, pipe.messages)) > 0 and pipe.ledger.take() == []

    run(work())


def test_a_peer_that_is_gone_ends_it_quietly() -> None:
    pipe = Pipe()
    pipe.broken = True

    async def work() -> None:
        pipe.stream.heart.start(Pulse(), every_s=0.0)
        assert await pipe.stream.heart._tasks[0] is None
        pipe.stream.heart.stop()

    run(work())


def test_a_reader_never_sees_it() -> None:
    writer = Pipe()
    warm, vote = Frame(Header(FrameKind.WARM)), Frame(Header(FrameKind.VOTE), b"ready")
    beat = Frame(Header(FrameKind.BEAT), to_bytes(Beat(1.0)))

    async def work() -> None:
        for frame in (warm, beat, Frame(Header(FrameKind.WARM), bytes(1000)), vote, warm, beat):
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


CHILD = """
import asyncio, sys
from swarm_core.wire.beats import Pulse
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.streams import dial

async def work():
    stream = await dial(sys.argv[1], "Stage/Link", Ledger(), "the parent", 20.0)
    stream.name("a-b", "down").heart.start(Pulse("at work", lambda: (3, 9)), every_s=0.05)
    await stream.receive()

asyncio.run(work())
"""


def beats_of_a_child(address: str) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'proto'}"}
    return subprocess.Popen([sys.executable, "-c", CHILD, address], env=environment, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_child_that_freezes_or_dies_is_lost_to_whoever_reads(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed: its stream breaks. Frozen: its stream stands, and its silence tells."""
    monkeypatch.setattr(silence, "LEAST_S", 0.5)
    monkeypatch.setattr(silence, "MOST_S", 2.0)
    monkeypatch.setattr(silence, "KNOWN_S", 0.5)
    found: list[Exception | None] = []
    streams: list[FrameStream] = []

    async def serve(stream: FrameStream) -> None:
        stream.peer = "stage 2"
        stream.heart.start(Pulse(), every_s=0.05)
        streams.append(stream)
        try:
            found.append(await stream.receive())  # type: ignore[arg-type]
        except PeerLost as error:
            found.append(error)
            raise
        finally:
            assert stream.heart.last_header is not None
            assert (stream.heart.last_header.epoch, stream.heart.last_header.tick) == (3, 9)
            ended.set()

    ended = asyncio.Event()

    async def work() -> None:
        server = Server("Stage", {"Link": serve}, Ledger())
        child = await asyncio.to_thread(beats_of_a_child, await server.start("127.0.0.1:0"))
        try:
            while not (streams and streams[0].heart.judge and streams[0].heart.judge.round_trip_s):
                await asyncio.sleep(0.01)
            os.kill(child.pid, number)
            await ended.wait()
        finally:
            child.kill()
            child.wait()
            await server.stop()

    run(work())
    (lost,) = found
    if number == signal.SIGSTOP:
        assert type(lost) is Silent and "stage 2 has been silent for" in str(lost), lost
        assert "s apart until now: taken as frozen or cut off" in str(lost)
    else:
        assert type(lost) in (PeerLost, type(None)), lost
