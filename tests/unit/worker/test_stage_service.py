"""The stage's server side over loopback: who may come in, and that an order is never lost with the sampler it went to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest
import torch
from safetensors.torch import load

from swarm_core.wire.errors import BadFrame, ManifestMismatch
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import Fetch, FrameKind, Hello, Order, Rollouts, from_bytes, to_bytes
from swarm_core.wire.streams import Dialled, FrameStream, dial
from swarm_worker.service import StageService

DIGEST = "ab" * 32


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, timeout=20))


async def no_link(stream: FrameStream) -> None:
    return None


def refuse_batch_13(rollouts: Rollouts) -> None:
    if rollouts.batch == 13:
        raise BadFrame("batch 13 arrived; ordered was 0")


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[tuple[StageService, str]]:
    service = StageService(1, Ledger(), no_link, refuse_batch_13)
    address = await service.server.start("127.0.0.1:0")
    try:
        yield service, address
    finally:
        await service.server.stop()


async def greeted(address: str, method: str, digest: str = DIGEST, **hello: Any) -> Dialled:
    stream = await dial(address, method, Ledger(), "stage 1", 5.0)
    stream.name("sampler-stage1", "up", {kind: 1 << 24 for kind in FrameKind})
    await stream.send(Frame(Header(FrameKind.HELLO), to_bytes(Hello(manifest_digest=digest, **hello))))
    return stream


async def welcome(address: str) -> Dialled:
    stream = await greeted(address, "Stage/Feed", role="feed")
    await stream.expect(FrameKind.WELCOME)
    return stream


@pytest.mark.parametrize(
    ("method", "hello", "error", "message"),
    [
        ("Stage/Link", {"stage": 0, "digest": "cd" * 32}, ManifestMismatch, "must join the same anchor"),
        ("Stage/Link", {"stage": 0, "protocol": 9}, ManifestMismatch, "protocol 9"),
        ("Stage/Link", {"stage": 1}, BadFrame, "stage 1 dialled stage 1; only stage 0 may"),
        ("Stage/Link", {"stage": 2}, BadFrame, "only stage 0 may"),
        ("Stage/Feed", {"digest": ""}, ManifestMismatch, "must join the same anchor"),
    ],
)
def test_who_is_turned_away(method: str, hello: dict[str, Any], error: type[Exception], message: str) -> None:
    async def work() -> None:
        async with serving() as (service, address):
            service.open(DIGEST, 1)
            stream = await greeted(address, method, **hello)
            with pytest.raises(error, match=message):
                await stream.receive()
            await stream.close()

    run(work())


def test_an_order_whose_rollouts_were_refused_goes_to_the_next_sampler() -> None:
    async def work() -> None:
        async with serving() as (service, address):
            service.open(DIGEST, 1)
            await service.order(Order(batch=4, generate=True))  # before any sampler is there
            first = await welcome(address)
            assert from_bytes(Order, (await first.expect(FrameKind.ORDER)).payload).batch == 4
            await first.send(Frame(Header(FrameKind.ROLLOUTS), to_bytes(Rollouts(batch=13))))
            with pytest.raises(BadFrame, match="batch 13 arrived"):
                await first.receive()
            second = await welcome(address)
            assert from_bytes(Order, (await second.expect(FrameKind.ORDER)).payload).batch == 4
            await second.close()
            third = await welcome(address)  # nor does it die with a sampler that vanishes
            assert from_bytes(Order, (await third.expect(FrameKind.ORDER)).payload).batch == 4
            await third.send(Frame(Header(FrameKind.ROLLOUTS), to_bytes(Rollouts(batch=4))))
            await service.order(Order(batch=5))
            assert from_bytes(Order, (await third.expect(FrameKind.ORDER)).payload).batch == 5
            await first.close()
            await third.close()

    run(work())


def test_a_sampler_gets_the_version_it_asks_for_or_the_next_newer_one() -> None:
    async def work() -> None:
        async with serving() as (service, address):
            service.offer(3, {"w": torch.tensor([3.0])})
            service.open(DIGEST, 1)
            stream = await welcome(address)
            for wanted, got in ((3, 3), (1, 3)):
                await stream.send(Frame(Header(FrameKind.FETCH), to_bytes(Fetch(wanted))))
                frame = await stream.expect(FrameKind.WEIGHTS)
                assert (frame.header.tick, load(bytes(frame.payload))["w"].item()) == (got, float(got))
            await stream.send(Frame(Header(FrameKind.FETCH), to_bytes(Fetch(7))))
            await service.publish(6, {"w": torch.tensor([6.0])}, {3, 6})
            await service.publish(8, {"w": torch.tensor([8.0])}, {6, 8})
            assert (await stream.expect(FrameKind.WEIGHTS)).header.tick == 8  # 7 was waited for
            await stream.close()

    run(work())


def test_a_sampler_that_sends_something_else_is_turned_away() -> None:
    async def work() -> None:
        async with serving() as (service, address):
            service.open(DIGEST, 1)
            stream = await welcome(address)
            await stream.send(Frame(Header(FrameKind.VOTE)))
            with pytest.raises(BadFrame, match="a sampler sent VOTE"):
                await stream.receive()
            await stream.close()

    run(work())


def test_an_order_goes_to_the_sampler_beside_the_one_that_left_and_to_nobody_twice() -> None:
    async def order_of(stream: Dialled) -> int:
        return from_bytes(Order, (await stream.expect(FrameKind.ORDER)).payload).batch

    async def work() -> None:
        async with serving() as (service, address):
            service.open(DIGEST, 1)
            first, second = await welcome(address), await welcome(address)
            await service.order(Order(batch=7, generate=True))
            assert await order_of(first) == 7
            await first.close()
            assert await order_of(second) == 7, "the one that stayed takes it over"
            # One that never had the order leaves while the other works on it: nothing is given out again.
            third = await welcome(address)
            await third.close()
            await asyncio.sleep(0.1)
            await second.send(Frame(Header(FrameKind.ROLLOUTS), to_bytes(Rollouts(batch=7))))
            await service.order(Order(batch=8, generate=True))
            assert await order_of(second) == 8, "and not 7 again"
            await second.close()

    run(work())
