"""The outbox: posting never waits, order is kept, bytes are bounded by those who ask for room."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from swarm_core.wire.errors import PeerLost
from swarm_core.wire.frames import Assembler, Frame, Header
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import FrameKind, Report
from swarm_core.wire.outbox import Outbox
from swarm_core.wire.streams import FrameStream


class Gate:
    """A stream whose writes wait until they are let through, one by one."""

    def __init__(self) -> None:
        self.sent: list[Frame] = []
        self._let = asyncio.Semaphore(0)
        self._assembler = Assembler(dict.fromkeys(FrameKind, 1 << 20))
        self.stream = FrameStream(self._read, self._write, Ledger(), "peer").name("a-b", "down")

    async def _write(self, message: bytes) -> None:
        await self._let.acquire()
        frame = self._assembler.feed(message)
        assert frame is not None
        self.sent.append(frame)

    async def _read(self) -> bytes:
        raise AssertionError("nobody reads here")

    async def let(self, n: int) -> None:
        for _ in range(n):
            self._let.release()
        for _ in range(10):
            await asyncio.sleep(0)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, timeout=10))


def bulk(number: int, size: int = 100) -> Frame:
    return Frame(Header(FrameKind.ACTIVATION, microbatch=number), bytes(size))


def test_a_maker_of_bulk_is_held_at_the_bound_and_control_is_not() -> None:
    async def work() -> None:
        gate = Gate()
        box = Outbox(gate.stream, limit_bytes=250)
        sending = asyncio.create_task(box.run())
        most = 0

        async def make() -> None:
            nonlocal most
            for number in range(20):
                await box.room()
                box.post(bulk(number))
                most = max(most, box.queued_bytes)

        making = asyncio.create_task(make())
        await gate.let(0)
        assert box.queued_bytes == 300 and not making.done()
        box.post(Frame(Header(FrameKind.VOTE), b"ready"))
        box.post_report(Report("ledger", 3))
        assert box.queued_bytes == 305, "posted at once, over the bound"
        await gate.let(22)
        await making
        await box.flush()
        assert box.queued_bytes == 0 and most == 300
        kinds = [frame.header.kind for frame in gate.sent]
        assert kinds[3:5] == [FrameKind.VOTE, FrameKind.REPORT], "in the order of posting"
        numbers = [frame.header.microbatch for frame in gate.sent if frame.header.kind is FrameKind.ACTIVATION]
        assert numbers == list(range(20))
        sending.cancel()

    run(work())


def test_a_frame_over_the_bound_goes_alone_rather_than_never() -> None:
    async def work() -> None:
        gate = Gate()
        box = Outbox(gate.stream, limit_bytes=10)
        sending = asyncio.create_task(box.run())
        for number in range(3):
            await box.room()
            box.post(bulk(number))
            making = asyncio.create_task(box.room())
            await gate.let(0)
            assert not making.done()
            await gate.let(1)
            await making
        assert len(gate.sent) == 3
        sending.cancel()

    run(work())


def test_what_is_sent_is_told_in_order_and_only_then() -> None:
    async def work() -> None:
        gate, told = Gate(), []
        box = Outbox(gate.stream)
        sending = asyncio.create_task(box.run())
        for number in range(3):
            box.post(bulk(number), sent=lambda n=number: told.append((n, box.queued_bytes)))
        await gate.let(0)
        assert told == []
        await gate.let(2)
        assert told == [(0, 200), (1, 100)]
        sending.cancel()

    run(work())


def test_a_lost_stream_ends_the_sending_not_the_posting() -> None:
    async def work() -> None:
        async def lost(_: bytes) -> None:
            raise asyncio.InvalidStateError

        box = Outbox(FrameStream(lost, lost, Ledger(), "stage 1"))  # type: ignore[arg-type]
        box.post(bulk(0))
        with pytest.raises(PeerLost, match="stage 1"):
            await box.run()
        box.post(bulk(1))
        assert box.queued_bytes == 200

    run(work())
