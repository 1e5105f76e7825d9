"""Streams over real loopback gRPC: errors keep their type both ways, and what was counted is what arrived."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import grpc
import pytest

from swarm_core.wire.errors import (
    ERROR_OF,
    STATUS_OF,
    BadAddress,
    BadFrame,
    PeerLost,
    PortInUse,
    Refused,
    Unreachable,
    from_status,
    status_of,
)
from swarm_core.wire.frames import CHUNK_BYTES, MAX_MESSAGE_BYTES, Frame, Header
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import FrameKind, Report, from_bytes
from swarm_core.wire.streams import Dialled, FrameStream, Server, dial, is_loopback

LIMITS = {kind: 1 << 26 for kind in FrameKind}
HELLO = Frame(Header(FrameKind.HELLO), b"hello")
Handler = Callable[[FrameStream], Awaitable[None]]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, timeout=20))


@contextlib.asynccontextmanager
async def serving(handler: Handler, ledger: Ledger | None = None) -> AsyncIterator[tuple[Server, str]]:
    server = Server("Stage", {"Link": handler}, ledger or Ledger())
    address = await server.start("127.0.0.1:0")
    try:
        yield server, address
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def connected(handler: Handler, ledger: Ledger | None = None) -> AsyncIterator[Dialled]:
    """A client's stream to a server with this handler."""
    async with serving(handler) as (_, address):
        stream = await dial(address, "Stage/Link", ledger or Ledger(), "stage 1", 5.0)
        stream.name("stage0-stage1", "down", LIMITS)
        try:
            yield stream
        finally:
            await stream.close()


async def drain(stream: FrameStream) -> None:
    while await stream.receive() is not None:
        pass


@pytest.mark.parametrize("error", STATUS_OF, ids=lambda e: e.__name__)
def test_a_refusal_arrives_as_what_it_was(error: type[Refused]) -> None:
    async def refuse(stream: FrameStream) -> None:
        await stream.expect(FrameKind.HELLO)
        raise error("stage 2 is held: é ü, take another")

    async def work() -> None:
        async with connected(refuse) as stream:
            await stream.send(HELLO)
            with pytest.raises(error) as caught:
                await stream.receive()
            assert type(caught.value) is error
            assert str(caught.value) == "stage 2 is held: é ü, take another"
            with pytest.raises(error):  # and whoever tries to send afterwards is told the same
                await stream.send(HELLO)

    run(work())


def test_a_refusal_of_a_finer_kind_travels_as_its_parent() -> None:
    class Finer(BadFrame):
        pass

    async def refuse(stream: FrameStream) -> None:
        raise Finer("finer")

    async def work() -> None:
        async with connected(refuse) as stream:
            with pytest.raises(BadFrame, match="finer"):
                await stream.receive()

    run(work())


def test_the_table_is_one_to_one_and_keeps_clear_of_grpcs_own_codes() -> None:
    assert len(ERROR_OF) == len(STATUS_OF)
    assert {cls for cls in Refused.__subclasses__() if cls.__module__ == Refused.__module__} == set(STATUS_OF)
    for kind, status in STATUS_OF.items():
        assert type(from_status(status, "why", "stage 1")) is kind and status_of(kind("why")) is status
    for status in set(grpc.StatusCode) - set(ERROR_OF):
        lost = from_status(status, "why", "stage 1")
        assert type(lost) is PeerLost and "stage 1" in str(lost) and "why" in str(lost)
    assert grpc.StatusCode.UNAVAILABLE not in ERROR_OF


def test_a_bug_of_the_server_is_a_lost_peer_not_a_refusal() -> None:
    async def broken(stream: FrameStream) -> None:
        raise ZeroDivisionError("a bug")

    async def work() -> None:
        async with connected(broken) as stream:
            with pytest.raises(PeerLost, match=r"stage 1 at 127\.0\.0\.1:\d+ broke: UNKNOWN"):
                await stream.receive()

    run(work())


def test_an_unknown_call_is_a_lost_peer() -> None:
    async def work() -> None:
        async with serving(drain) as (_, address):
            stream = await dial(address, "Stage/Nonsense", Ledger(), "stage 1", 5.0)
            with pytest.raises(PeerLost, match="UNIMPLEMENTED"):
                await stream.receive()
            await stream.close()

    run(work())


def test_what_arrives_is_what_was_sent_and_what_the_sender_has_counted() -> None:
    sizes = [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 << 20]
    arrived: list[Frame] = []
    raw: list[int] = []
    ledger = Ledger()

    async def take(stream: FrameStream) -> None:
        stream.name("stage0-stage1", "up", LIMITS)
        read = stream._read

        async def counting() -> Any:
            message = await read()
            raw.append(0 if message is grpc.aio.EOF else len(message))
            return message

        stream._read = counting
        while (frame := await stream.receive()) is not None:
            arrived.append(frame)

    async def work() -> None:
        async with connected(take, ledger) as stream:
            for tick, size in enumerate(sizes):
                await stream.send(Frame(Header(FrameKind.ACTIVATION, tick=tick), bytes(size), dense_bytes=7))
            await stream.send_report(Report("ledger", 9), 9)
            await stream.finish()

    run(work())
    assert [memoryview(f.payload).nbytes for f in arrived[:-1]] == sizes
    rows = from_bytes(Report, arrived[-1].payload).ledger
    assert sum(row.message_bytes for row in rows) == sum(raw)
    assert sum(row.packet_bytes for row in rows) == sum(memoryview(f.payload).nbytes for f in arrived)
    assert sum(row.frames for row in rows) == len(arrived)
    assert ledger.take() == []


def test_frames_of_several_tasks_do_not_mix() -> None:
    arrived: list[tuple[int, bytes]] = []

    async def take(stream: FrameStream) -> None:
        stream.name("", "up", LIMITS)
        while (frame := await stream.receive()) is not None:
            arrived.append((frame.header.microbatch, bytes(frame.payload)))

    async def work() -> None:
        async with connected(take) as stream:
            frames = [Frame(Header(FrameKind.GRADIENT, microbatch=i), bytes([i]) * (CHUNK_BYTES + i)) for i in range(5)]
            await asyncio.gather(*(stream.send(frame) for frame in frames))
            await stream.finish()

    run(work())
    assert sorted(arrived) == [(i, bytes([i]) * (CHUNK_BYTES + i)) for i in range(5)]


def test_a_frame_over_its_limit_is_refused_over_the_wire() -> None:
    async def take(stream: FrameStream) -> None:
        stream.name("", "up", {FrameKind.ACTIVATION: 10})
        await drain(stream)

    async def work() -> None:
        async with connected(take) as stream:
            await stream.send(Frame(Header(FrameKind.ACTIVATION), bytes(11)))
            with pytest.raises(BadFrame, match="at most 10"):
                await stream.receive()

    run(work())


def test_no_message_above_four_mebibytes_gets_in() -> None:
    async def take(stream: FrameStream) -> None:
        stream.name("", "up", LIMITS)
        await drain(stream)

    async def send(address: str, size: int) -> grpc.StatusCode:
        options = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            call = channel.stream_stream("/swarm.v1.Stage/Link", request_serializer=None, response_deserializer=None)()
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await call.write(bytes(size))
                await call.read()
            return await call.code()

    async def work() -> None:
        async with serving(take) as (_, address):
            assert await send(address, MAX_MESSAGE_BYTES) is STATUS_OF[BadFrame]  # let in, and no frame
            assert await send(address, MAX_MESSAGE_BYTES + 1) is not STATUS_OF[BadFrame]
            assert await send(address, MAX_MESSAGE_BYTES) is STATUS_OF[BadFrame]  # the server has outlived it

    run(work())


def test_the_dialler_leaving_properly_is_the_end_of_the_stream() -> None:
    ends: list[object] = []

    async def take(stream: FrameStream) -> None:
        await stream.expect(FrameKind.HELLO)
        ends.append(await stream.receive())

    async def work() -> None:
        async with connected(take) as stream:
            await stream.send(HELLO)
            await stream.finish()

    run(work())
    assert ends == [None]


def test_the_dialler_vanishing_ends_the_servers_stream() -> None:
    ended = asyncio.Event()
    ends: list[object] = []

    async def take(stream: FrameStream) -> None:
        try:
            await stream.expect(FrameKind.HELLO)
            ends.append(await stream.receive())
        except BaseException as error:
            ends.append(error)
            raise
        finally:
            ended.set()

    async def work() -> None:
        async with serving(take) as (_, address):
            stream = await dial(address, "Stage/Link", Ledger(), "stage 1", 5.0)
            await stream.send(HELLO)
            await stream.close()
            await asyncio.wait_for(ended.wait(), 5)

    run(work())
    assert len(ends) == 1 and (ends[0] is None or isinstance(ends[0], PeerLost | asyncio.CancelledError))


def test_the_server_leaving_is_an_end_or_a_lost_peer() -> None:
    async def work() -> None:
        async def leave(stream: FrameStream) -> None:
            await stream.expect(FrameKind.HELLO)

        async with connected(leave) as stream:
            await stream.send(HELLO)
            assert await stream.receive() is None
            with pytest.raises(PeerLost):
                await stream.send(HELLO)

        async with serving(drain) as (server, address):
            stream = await dial(address, "Stage/Link", Ledger(), "stage 1", 5.0)
            await stream.send(HELLO)
            stopping = asyncio.create_task(server.stop())
            with pytest.raises(PeerLost, match="stage 1"):
                await stream.receive()
            await stopping
            await stream.close()

    run(work())


def test_expect_names_what_came_instead() -> None:
    async def answer(stream: FrameStream) -> None:
        with pytest.raises(BadFrame, match="sent HELLO; a READY was expected"):
            await stream.expect(FrameKind.READY)
        await stream.send(HELLO)

    async def work() -> None:
        async with connected(answer) as stream:
            await stream.send(HELLO)
            with pytest.raises(BadFrame, match=r"stage 1 at .* sent HELLO; a WELCOME was expected"):
                await stream.expect(FrameKind.WELCOME)
            with pytest.raises(PeerLost, match="closed the stream; a WELCOME was expected"):
                await stream.expect(FrameKind.WELCOME)

    run(work())


def test_a_port_in_use_is_said_in_one_line() -> None:
    async def work() -> None:
        async with serving(drain) as (_, address):
            with pytest.raises(PortInUse, match=f"cannot listen on {address} .*choose another --listen") as caught:
                await Server("Stage", {}, Ledger()).start(address)
            assert "\n" not in str(caught.value) and caught.value.address == address

    run(work())


@pytest.mark.parametrize("address", ["", "host", ":1", "host:", "host:x", "host:70000", "host:-1"])
def test_an_address_that_is_none(address: str) -> None:
    async def work() -> None:
        with pytest.raises(BadAddress, match="HOST:PORT"):
            await Server("Stage", {}, Ledger()).start(address)
        with pytest.raises(BadAddress, match="HOST:PORT"):
            await dial(address, "Stage/Link", Ledger(), "stage 1", 1.0)

    run(work())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_nobody_there_is_said_after_the_time_given() -> None:
    waited: list[float] = []

    async def work() -> None:
        address = f"127.0.0.1:{free_port()}"
        with pytest.raises(Unreachable, match=f"the anchor at {address} did not answer") as caught:
            await dial(address, "Anchor/Attend", Ledger(), "the anchor", 0.3, waited.append)
        assert caught.value.waited_s == 0.3

    run(work())
    assert len(waited) == 1 and 0.2 < waited[0] < 2


def test_a_server_that_comes_up_late_is_found() -> None:
    async def work() -> None:
        address = f"127.0.0.1:{free_port()}"
        dialling = asyncio.create_task(dial(address, "Stage/Link", Ledger(), "stage 1", 15.0))
        await asyncio.sleep(0.1)
        server = Server("Stage", {"Link": drain}, Ledger())
        assert await server.start(address) == address
        stream = await dialling
        await stream.finish()
        await server.stop()

    run(work())


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.9.9.9:1", "localhost:1", "[::1]:1"])
def test_loopback(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize("address", ["0.0.0.0:1", "10.0.0.1:1", "example.org:1", "[::]:1", "localhost.example.org:1"])
def test_not_loopback(address: str) -> None:
    assert not is_loopback(address)
