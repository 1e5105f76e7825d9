"""The health service over real sockets: the three answers, whatever is asked, and that nothing a caller does holds it up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from swarm_core.wire import health as serving
from swarm_core.wire.errors import PortInUse
from swarm_core.wire.health import AT_ONCE, Health


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, timeout=20))


@contextlib.asynccontextmanager
async def answering() -> AsyncIterator[Health]:
    health = Health()
    await health.start(0, "127.0.0.1:7400")
    try:
        yield health
    finally:
        await health.stop()


async def get(health: Health, request: str) -> tuple[int, str, str]:
    """Status, head and body."""
    host, port = health.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request.encode())
    answer = (await reader.read()).decode()
    writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split()[1]) if head else 0, head, body


async def ask(health: Health, path: str) -> tuple[int, dict[str, Any]]:
    code, _, body = await get(health, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")
    return code, json.loads(body)


def test_the_three_are_told_apart_and_asked_anew() -> None:
    async def work() -> None:
        async with answering() as health:
            assert await ask(health, "/startup") == (503, {"ok": False, "why": "starting"})
            assert await ask(health, "/ready") == (503, {"ok": False, "why": "starting"})
            assert (await ask(health, "/live"))[0] == 200
            health.startup, health.ready = lambda: (True, "loaded"), lambda: (False, "leaving")
            assert await ask(health, "/startup?probe=1") == (200, {"ok": True, "why": "loaded"})
            assert await ask(health, "/ready") == (503, {"ok": False, "why": "leaving"})
            health.live = lambda: 1 // 0  # type: ignore[assignment,return-value]
            assert (await ask(health, "/live"))[0] == 503

    run(work())


def test_anything_else_is_refused_in_good_http() -> None:
    async def work() -> None:
        async with answering() as health:
            assert (await ask(health, "/"))[0] == 404
            assert (await get(health, "POST /live HTTP/1.1\r\n\r\n"))[0] == 405
            code, head, body = await get(health, "HEAD /live HTTP/1.1\r\n\r\n")
            assert code == 200 and "Content-Length: " in head and body == ""
            for nonsense in ("\r\n\r\n", "x\r\n\r\n", "\x16\x03\x01\r\n\r\n", "GET /" + "a" * 10_000 + "\r\n\r\n"):
                assert (await get(health, nonsense))[0] == 0, "closed without a word"
            assert (await ask(health, "/live"))[0] == 200

    run(work())


def test_callers_that_say_nothing_hold_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "REQUEST_S", 0.3)

    async def work() -> None:
        async with answering() as health:
            host, port = health.address.split(":")
            silent = [await asyncio.open_connection(host, int(port)) for _ in range(AT_ONCE - 1)]
            assert (await ask(health, "/live"))[0] == 200
            for reader, writer in silent:
                assert await reader.read() == b"", "and they are let go"
                writer.close()

    run(work())


def test_off_loopback_it_answers_to_all_and_without_a_port_to_nobody() -> None:
    async def work() -> None:
        health = Health()
        await health.start(None, "0.0.0.0:7400")
        assert health.address == ""
        await health.start(0, "0.0.0.0:7400")
        assert health.address.startswith("0.0.0.0:")
        await health.stop()

    run(work())


def test_a_port_in_use_is_said() -> None:
    async def work() -> None:
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            held.listen()
            with pytest.raises(PortInUse, match="--health-port"):
                await Health().start(held.getsockname()[1], "127.0.0.1:0")

    run(work())
