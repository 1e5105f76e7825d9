"""What a stranger may try out on an anchor, and where it ends: calls, trials, bytes, and whom the anchor dials back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from anchor_node import probing
from anchor_node.probing import CALL_BYTES, LOAD_BYTES, NONCE_BYTES, TRIALS, Probing, dial_back, host_of
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import FrameKind, Hello, Trial, Tried, from_bytes, to_bytes
from swarm_core.wire.streams import Dialled, Server, dial

NONCE = bytes(range(NONCE_BYTES))


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, timeout=30))


@pytest.fixture(autouse=True)
def _phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "phase", lambda anchor: "at work")


class Call:
    """The other end of a probe."""

    def __init__(self, stream: Dialled) -> None:
        self.stream = stream

    async def send(self, kind: FrameKind, message: Any) -> None:
        payload = message if isinstance(message, bytes) else to_bytes(message)
        await self.stream.send(Frame(Header(kind), payload))

    async def tried(self) -> Tried:
        return from_bytes(Tried, (await self.stream.expect(FrameKind.TRIED)).payload)

    async def ask(self, trial: Trial) -> Tried:
        await self.send(FrameKind.TRIAL, trial)
        return await self.tried()


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[str]:
    anchor = SimpleNamespace(manifest=SimpleNamespace(config=SimpleNamespace(run=SimpleNamespace(name="demo"))))
    server = Server("Anchor", {"Probe": Probing(anchor).serve}, Ledger())  # type: ignore[arg-type]
    try:
        yield await server.start("127.0.0.1:0")
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def calling(address: str, role: str = "probe") -> AsyncIterator[Call]:
    stream = await dial(address, "Anchor/Probe", Ledger(), "the anchor", 5.0)
    call = Call(stream.name("anchor-probe", "up", {FrameKind.LOAD: LOAD_BYTES}))
    await call.send(FrameKind.HELLO, Hello(role=role))
    try:
        yield call
    finally:
        await stream.close()


def test_echoes_loads_and_what_the_anchor_is() -> None:
    async def work() -> None:
        async with serving() as address, calling(address) as call:
            first = await call.tried()
            assert (first.run, first.phase, first.seen, first.refused) == ("demo", "at work", "127.0.0.1", "")
            assert first.versions["torch"] and (await call.ask(Trial("echo"))).clock_s >= first.clock_s
            await call.send(FrameKind.TRIAL, Trial("down", 3 << 20))
            assert len((await call.stream.expect(FrameKind.LOAD)).payload) == 3 << 20
            assert (await call.tried()).load_bytes == 3 << 20
            await call.send(FrameKind.TRIAL, Trial("up", 70_000))
            await call.send(FrameKind.LOAD, bytes(70_000))
            assert (await call.tried()).load_bytes == 70_000

    run(work())


def test_one_call_of_an_address_at_a_time() -> None:
    async def work() -> None:
        async with serving() as address:
            async with calling(address) as call:
                await call.tried()
                async with calling(address) as second:
                    assert "a probe of your address is under way" in (await second.tried()).refused
                    assert await second.stream.receive() is None
                assert not (await call.ask(Trial("echo"))).refused, "which the first one does not notice"
            while True:  # it has not ended before the anchor has seen its end
                async with calling(address) as again:
                    if not (await again.tried()).refused:
                        return

    run(work())


async def _load(call: Call, size: int) -> None:
    await call.send(FrameKind.TRIAL, Trial("down", size))
    await call.stream.expect(FrameKind.LOAD)
    await call.tried()


async def too_large(call: Call) -> None:
    await _load(call, LOAD_BYTES + 1)


async def too_often(call: Call) -> None:
    for _ in range(TRIALS):
        await call.ask(Trial("echo"))
    await call.stream.receive()  # nothing more is read; to write would be to race the end


async def dialled_twice(call: Call) -> None:
    assert (await call.ask(Trial("reach", port=22, nonce=NONCE))).refused
    await call.ask(Trial("reach", port=8022, nonce=NONCE))


async def nonsense(call: Call) -> None:
    await call.ask(Trial("exec"))


@pytest.mark.parametrize("asks", [too_large, too_often, dialled_twice, nonsense], ids=lambda a: a.__name__)
def test_more_than_that_ends_the_call(asks: Callable[[Call], Awaitable[None]]) -> None:
    async def work() -> None:
        async with serving() as address, calling(address) as call:
            await call.tried()
            with pytest.raises(BadFrame, match="a probe"):
                await asks(call)

    run(work())


def test_the_bytes_of_a_call_are_counted_together() -> None:
    async def work() -> None:
        async with serving() as address, calling(address) as call:
            await call.tried()
            for _ in range(CALL_BYTES // LOAD_BYTES):
                await _load(call, LOAD_BYTES)
            with pytest.raises(BadFrame, match=f"{CALL_BYTES} in all"):
                await _load(call, 1)

    run(work())


def test_a_member_does_not_come_here() -> None:
    async def work() -> None:
        async with serving() as address, calling(address, role="stage") as call:
            with pytest.raises(BadFrame, match="a stage came"):
                await call.tried()

    run(work())


def test_whom_the_anchor_dials_back() -> None:
    said = NONCE

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        writer.close()

    async def work() -> None:
        nonlocal said
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        assert await dial_back("127.0.0.1", port, NONCE) == ""
        said = bytes(NONCE_BYTES)
        assert "is not this worker" in await dial_back("127.0.0.1", port, NONCE)
        said = b"SSH-2.0"
        assert "something else listens there" in await dial_back("127.0.0.1", port, NONCE)
        server.close()
        await server.wait_closed()
        assert f"127.0.0.1:{port}: " in await dial_back("127.0.0.1", port, NONCE)
        for refused in (22, 0, 70_000):
            assert "is not dialled" in await dial_back("127.0.0.1", refused, NONCE)
        assert "is not dialled" in await dial_back("127.0.0.1", port, b"short")

    run(work())


def test_an_address_out_of_what_grpc_calls_a_peer() -> None:
    assert host_of("ipv4:10.0.0.7:50132") == "10.0.0.7"
    assert host_of("ipv6:%5B2001:db8::1%5D:50132") == "2001:db8::1"
