"""The link to the anchor: numbered reports over streams that break, what else survives, and whose waiting is counted."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from swarm_core.wire import ledger as ledgers
from swarm_core.wire.errors import BadFrame, PeerLost, StageTaken
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import (
    Booked,
    FrameKind,
    Hello,
    LedgerRow,
    Report,
    Saved,
    Stop,
    Welcome,
    from_bytes,
    to_bytes,
)
from swarm_core.wire.streams import FrameStream, Server
from swarm_worker import anchor_link
from swarm_worker.anchor_link import AnchorLink, Standing
from swarm_worker.membership import Membership, Way, greet

DIGEST = "ab" * 32
LIMITS = {kind: 1 << 24 for kind in FrameKind}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchor_link, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(anchor_link, "LONGEST_PAUSE_S", 0.02)


class Books:
    """An anchor's side of the contract: books each number once, and may break the stream at any frame."""

    def __init__(self) -> None:
        self.booked = 0
        self.rows: list[str] = []
        self.ledger: list[LedgerRow] = []
        self.others: list[tuple[FrameKind, int]] = []
        self.hellos: list[Hello] = []
        self.acknowledge = True
        self.breaks: list[int] = []  # of each stream: after how many frames it breaks, before or after booking the last
        self.refuse: list[Exception] = []
        self.stop_with: Exception | None = None
        self.stream: FrameStream | None = None

    async def start(self, address: str = "127.0.0.1:0") -> str:
        self.server = Server("Anchor", {"Attend": self._attend}, Ledger())
        return await self.server.start(address)

    async def _attend(self, stream: FrameStream) -> None:
        stream.name("anchor-stage0", "down", LIMITS)
        hello = from_bytes(Hello, (await stream.expect(FrameKind.HELLO)).payload)
        self.hellos.append(hello)
        if hello.at_work and self.refuse:
            raise self.refuse.pop(0)
        await stream.send(Frame(Header(FrameKind.WELCOME), to_bytes(Welcome("", DIGEST, 1, self.booked))))
        self.stream = stream
        left = self.breaks.pop(0) if self.breaks else -1
        while (frame := await stream.receive()) is not None:
            left -= 1
            if left == 0:
                return  # read, and never booked
            self._take(frame)
            if self.stop_with is not None:
                raise self.stop_with
            if left == 1 and self.breaks and self.breaks[0] % 2:
                return  # booked, and never acknowledged
            if self.acknowledge and frame.header.kind is FrameKind.REPORT:
                await stream.send(Frame(Header(FrameKind.BOOKED), to_bytes(Booked(self.booked))))

    def _take(self, frame: Frame) -> None:
        if frame.header.kind is not FrameKind.REPORT:
            self.others.append((frame.header.kind, frame.header.tick))
            return
        report = from_bytes(Report, frame.payload)
        if report.number > self.booked:
            self.booked = report.number
            self.ledger += report.ledger
            if report.type != "ledger":
                self.rows.append(f"{report.type} {report.tick}")


@contextlib.asynccontextmanager
async def linked(
    books: Books, checkpoints: int = 2, standing: Callable[[], Standing] = lambda: Standing(1, 40, 3)
) -> AsyncIterator[tuple[AnchorLink, Ledger, asyncio.Task[None]]]:
    address = await books.start()
    ledger = Ledger()
    way = Way(address, "Anchor/Attend", ledger, "anchor-stage0", Hello(role="stage", member=7))
    stream, _ = await greet(way, lambda: way.hello, 5.0)
    link = AnchorLink(Membership(stream, None, DIGEST, way), standing, checkpoints)  # type: ignore[arg-type]
    task = asyncio.create_task(link.run())
    try:
        yield link, ledger, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await books.server.stop()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, timeout=30))


def frame(kind: FrameKind, tick: int, message: Any) -> Frame:
    return Frame(Header(kind, tick=tick), to_bytes(message))


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("seed", range(6))
def test_every_row_is_booked_once_whatever_breaks(seed: int) -> None:
    rng = random.Random(seed)
    books = Books()
    books.breaks = [rng.randint(1, 8) for _ in range(12)]

    async def work() -> None:
        async with linked(books) as (link, ledger, _):
            for tick in range(60):
                ledger.count(tick, "stage0-stage1", "down", FrameKind.ACTIVATION, dense=9, packet=4, message=104)
                link.post_report(Report("tick", tick))
                link.post_report(Report("ledger", tick))
                if rng.random() < 0.5:
                    await asyncio.sleep(rng.random() * 0.02)
            assert await link.leave(20)
            assert link.take_wait_s() > 0, "leaving waits, and is counted"

    run(work())
    assert books.rows == [f"tick {tick}" for tick in range(60)]
    links = Counter(row.tick for row in books.ledger if row.kind == "activation")
    assert links == {tick: 1 for tick in range(60)} and not books.breaks
    assert [hello.at_work for hello in books.hellos] == [False] + [True] * 12
    back = books.hellos[-1]
    assert (back.member, back.epoch, back.tick, back.basis_version, back.manifest_digest) == (7, 1, 40, 3, DIGEST)


def test_what_means_the_same_twice_is_said_again_and_of_sketches_the_newest_wait() -> None:
    books = Books()
    books.breaks = [1]
    said = [frame(FrameKind.SAVED, tick, Saved(tick, f"tick-{tick}")) for tick in (10, 20, 30)]

    async def work() -> None:
        async with linked(books) as (link, _, _task):
            began_again = []
            link.on_return.append(lambda: began_again.append(link.away_since))
            books.refuse = [StageTaken("not yet")] * 3
            link.post(said[0])  # breaks it
            await until(lambda: link.away_since is not None)
            for tick in (12, 14, 16):
                link.post(frame(FrameKind.SNAPSHOT, tick, Saved()))
                link.post(frame(FrameKind.SKETCH, tick, Saved()))
                link.post(frame(FrameKind.SKETCH, tick, Saved()))
            link.post(said[1])
            link.post(frame(FrameKind.STOP, 0, Stop("enough")))
            link.post_report(Report("event", 30))
            link.post(said[2])
            link.post(frame(FrameKind.SAVED, 40, Saved(40, "tick-40")))
            link.forget_saved(30)  # an epoch begins at an earlier tick
            link.post(said[1])
            link.post(said[2])
            await until(lambda: len(books.others) >= 5)
            assert await link.leave(5)
            assert began_again == [None]

    run(work())
    assert books.others == [
        (FrameKind.SKETCH, 16),
        (FrameKind.SKETCH, 16),
        (FrameKind.SAVED, 20),
        (FrameKind.SAVED, 30),
        (FrameKind.STOP, 0),
    ]
    assert books.rows == ["event 30"] and not books.refuse


def test_a_member_says_where_it_stands_when_it_is_back_and_not_when_it_began_to_dial() -> None:
    books, tick = Books(), 40

    async def work() -> None:
        nonlocal tick
        async with linked(books, standing=lambda: Standing(1, tick, 3)) as (link, _, _):
            address = link.address
            await books.server.stop()
            await until(lambda: link.away_since is not None)
            await asyncio.sleep(0.2)  # it dials, and nobody is there
            tick = 43
            await books.start(address)
            await until(lambda: len(books.hellos) == 2)
            assert books.hellos[1].tick == 43

    run(work())


def test_posting_goes_on_while_the_anchor_reads_and_says_nothing() -> None:
    books = Books()
    books.acknowledge = False

    async def work() -> None:
        async with linked(books) as (link, _, _task):
            for tick in range(2000):
                link.post_report(Report("tick", tick, words={"text": "x" * 100}))
            assert link.take_wait_s() == 0.0
            assert not await link.leave(0.2), "nothing is booked"
            assert 0.2 <= link.take_wait_s() < 20 and link.take_wait_s() == 0.0

    run(work())


def test_waiting_is_counted_for_everybody_but_the_one_reader() -> None:
    books = Books()

    async def work() -> None:
        async with linked(books) as (link, _, _task):
            reader = asyncio.create_task(link.receive())
            await until(lambda: books.stream is not None)
            await asyncio.sleep(0.05)
            assert books.stream is not None
            await books.stream.send(frame(FrameKind.STOP, 0, Stop("over", now=True)))
            received = await reader
            assert received is not None and received.header.kind is FrameKind.STOP
            assert link.take_wait_s() == 0.0
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(
                    link.receive(), 0.05
                )  # as a tick path would, if it asked the anchor for something
            assert link.take_wait_s() >= 0.04

    run(work())


def test_a_frame_that_the_anchor_refuses_ends_the_link_with_its_reason() -> None:
    books = Books()
    books.stop_with = BadFrame("a sketch of boundary 9 was not asked for")

    async def work() -> None:
        async with linked(books) as (link, _, task):
            link.post(frame(FrameKind.SKETCH, 1, Saved()))
            with pytest.raises(BadFrame, match="boundary 9"):
                await task

    run(work())


def test_last_words_are_booked_before_the_end() -> None:
    books = Books()

    async def work() -> None:
        async with linked(books) as (link, _, _task):
            await link.last_words("stage 0", PeerLost("stage 1 closed its link"))

    run(work())
    assert books.rows == ["event 0"]


def test_more_ledger_rows_than_a_report_takes_go_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "MOST_ROWS", 10)
    books = Books()

    async def work() -> None:
        async with linked(books) as (link, ledger, _):
            for tick in range(55):
                ledger.count(tick, "stage0-stage1", "down", FrameKind.GRADIENT, dense=9, packet=4, message=104)
            link.post_report(Report("ledger", 55))
            assert await link.leave(5)
            assert ledger.waiting == 0

    run(work())
    assert books.booked >= 6
    assert Counter(row.tick for row in books.ledger if row.kind == "gradient") == {tick: 1 for tick in range(55)}


def test_away_for_measures_one_outage_without_a_break() -> None:
    async def work() -> None:
        books = Books()
        async with linked(books) as (link, _, _task):
            waiting = asyncio.create_task(link.away_for(0.15))
            await asyncio.sleep(0.3)
            assert not waiting.done(), "the anchor is there"
            await books.server.stop()
            await until(waiting.done)
            assert link.away_since is not None

    run(work())
