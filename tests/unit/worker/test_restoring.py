"""A newcomer fetches the copy of a stage: over streams that break, from a source that dies, and killed itself in the middle."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from anchor_node import copies
from anchor_node.copies import StageCopy
from swarm_core.wire.errors import BadFrame, PeerLost
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import (
    Copies,
    Copy,
    CopyHeld,
    CopyWanted,
    FrameKind,
    Hello,
    Stop,
    Welcome,
    from_bytes,
    to_bytes,
)
from swarm_core.wire.streams import FrameStream, Server
from swarm_worker import restoring
from swarm_worker.membership import Membership, Way, greet
from swarm_worker.restoring import Restoring

STAGE, STAGES, START, DIGEST = 0, 3, 77, "ab" * 32
NAMES = ["journal.jsonl", "redo/stage-00-of-03/tick-00000000.log", "redo/stage-00-of-03/tick-00000008.log"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "MOST_BYTES", 400)


class Source:
    """An anchor that has a copy, and may break any stream, or be killed and started again."""

    def __init__(self, out: Path, rng: random.Random) -> None:
        self.copy, self.rng = StageCopy(out, STAGE, STAGES), rng
        self.files = {name: rng.randbytes(rng.randrange(1, 3000)) for name in NAMES}
        for name, data in self.files.items():
            checksum = 0
            for at in range(0, len(data), 400):
                held = self.copy.take(Copy(name, at, checksum, data[at : at + 400], start_id=START, newest=8), START)
                checksum = held.checksum
        self.asked: list[tuple[str, int]] = []
        self.answers: list[Any] = []  # in place of the next ones
        self.breaks = 0.0
        self.others: list[Frame] = []  # said before the next answer

    async def start(self, address: str = "127.0.0.1:0") -> str:
        self.server = Server("Anchor", {"Attend": self._attend}, Ledger())
        return await self.server.start(address)

    async def _attend(self, stream: FrameStream) -> None:
        stream.name("anchor-stage0", "down")
        await stream.expect(FrameKind.HELLO)
        await stream.send(Frame(Header(FrameKind.WELCOME), to_bytes(Welcome("", DIGEST, 1, 0))))
        while (frame := await stream.receive()) is not None:
            if self.rng.random() < self.breaks:
                return
            while self.others:
                await stream.send(self.others.pop())
            if frame.header.kind is FrameKind.COPIES:
                kind, answer = FrameKind.COPIES, self.copy.listed()
            else:
                wanted = from_bytes(CopyWanted, frame.payload)
                self.asked.append((wanted.file, wanted.offset))
                kind, answer = FrameKind.COPY, self.copy.read(wanted)
            await stream.send(Frame(Header(kind), to_bytes(self.answers.pop() if self.answers else answer)))


async def fetched(source: Source, out: Path, address: str, start_id: int = 0) -> tuple[bool, Membership]:
    way = Way(address, "Anchor/Attend", Ledger(), "anchor-stage0", Hello(role="stage", member=7))
    stream, _ = await greet(way, lambda: way.hello, 5.0)
    membership = Membership(stream, SimpleNamespace(stages=STAGES), DIGEST, way)  # type: ignore[arg-type]
    try:
        return await Restoring(membership, out, STAGE).run(start_id), membership
    finally:
        await membership.anchor.close()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, timeout=60))


def check(source: Source, out: Path) -> None:
    assert {name: (out / name).read_bytes() for name in NAMES} == source.files
    assert not list((out / "restore").rglob("*.log"))


@pytest.mark.parametrize("seed", range(4))
def test_a_fetch_goes_on_over_streams_that_break(seed: int, tmp_path: Path) -> None:
    source = Source(tmp_path / "anchor", random.Random(seed))
    source.breaks = 0.2

    async def work() -> bool:
        try:
            return (await fetched(source, tmp_path / "out", await source.start()))[0]
        finally:
            await source.server.stop()

    assert run(work())
    check(source, tmp_path / "out")


def test_a_source_that_dies_is_waited_for_and_what_has_come_is_not_asked_again(tmp_path: Path) -> None:
    source = Source(tmp_path / "anchor", random.Random(5))

    async def work() -> bool:
        address = await source.start()
        fetching = asyncio.create_task(fetched(source, tmp_path / "out", address))
        while len(source.asked) < 4:
            await asyncio.sleep(0)
        await source.server.stop()
        before = len(source.asked)
        await asyncio.sleep(0.3)
        source.copy = StageCopy(tmp_path / "anchor", STAGE, STAGES)  # another process, the same volume
        await source.start(address)
        done, _ = await fetching
        await source.server.stop()
        again = [asked for asked in source.asked[before:] if asked in source.asked[: before - 1]]
        assert not again
        return done

    assert run(work())
    check(source, tmp_path / "out")


def test_a_newcomer_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    source, out = Source(tmp_path / "anchor", random.Random(6)), tmp_path / "out"

    async def work() -> bool:
        address = await source.start()
        first = asyncio.create_task(fetched(source, out, address))
        while len(source.asked) < 6:
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait({first})
        source.asked.clear()
        (out / "redo").mkdir(parents=True, exist_ok=True)
        done, _ = await fetched(source, out, address, START)  # also where it believes that it holds this start's log
        await source.server.stop()
        assert source.asked[0] != (NAMES[0], 0)
        return done

    assert run(work())
    check(source, out)


def test_what_came_damaged_is_fetched_again(tmp_path: Path) -> None:
    source, out = Source(tmp_path / "anchor", random.Random(8)), tmp_path / "out"

    async def work() -> bool:
        address = await source.start()
        wrong = bytearray(source.files[NAMES[0]][:400])
        wrong[3] ^= 1
        source.answers = [Copy(NAMES[0], 0, part=bytes(wrong)), source.copy.listed()]
        try:
            return (await fetched(source, out, address))[0]
        finally:
            await source.server.stop()

    assert run(work())
    check(source, out)


@pytest.mark.parametrize(
    "answers",
    [
        [Copies(START, [CopyHeld("../../etc/passwd", 3, 0)])],
        [Copies(START, [CopyHeld("redo/stage-01-of-03/tick-00000000.log", 3, 0)])],
        [Copies(START, [CopyHeld(NAMES[0], 3, 0)]), Copy(NAMES[0], 0, part=b"longer than said")],
        [Copies(START, [CopyHeld(NAMES[0], 3, 0)]), Copy(NAMES[1], 0, part=b"xyz")],
        [Copies(START, [CopyHeld(NAMES[0], 3, 0)]), Copy(NAMES[0], 1, part=b"yz")],
        [Copies(START, [CopyHeld(NAMES[0], 3, 0)]), Copy(NAMES[0], 0, part=b"")],
    ],
)
def test_a_source_that_says_something_else_is_refused(answers: list[Any], tmp_path: Path) -> None:
    source, out = Source(tmp_path / "anchor", random.Random(9)), tmp_path / "out"
    source.answers = answers[::-1]

    async def work() -> None:
        try:
            await fetched(source, out, await source.start())
        finally:
            await source.server.stop()

    with pytest.raises(BadFrame, match="the anchor (lists|sent)"):
        run(work())
    assert not (tmp_path / "etc").exists() and not (out / "redo").exists()


def test_an_older_log_goes_and_an_older_journal_is_kept_beside(tmp_path: Path) -> None:
    source, out = Source(tmp_path / "anchor", random.Random(10)), tmp_path / "out"
    stale = out / "redo/stage-00-of-03/tick-00000099.log"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of another start")
    (out / "journal.jsonl").write_text("of another run")

    async def work() -> bool:
        try:
            return (await fetched(source, out, await source.start(), start_id=5))[0]
        finally:
            await source.server.stop()

    assert run(work())
    check(source, out)
    assert not stale.exists() and (out / "journal.jsonl.before").read_text() == "of another run"


def test_a_run_that_ends_meanwhile_ends_the_fetch_and_what_was_said_is_not_lost(tmp_path: Path) -> None:
    source, out = Source(tmp_path / "anchor", random.Random(11)), tmp_path / "out"
    source.others = [Frame(Header(FrameKind.STOP), to_bytes(Stop("done", True)))]

    async def work() -> tuple[bool, Membership]:
        try:
            return await fetched(source, out, await source.start())
        finally:
            await source.server.stop()

    done, membership = run(work())
    assert not done and [frame.header.kind for frame in membership.early] == [FrameKind.STOP]


def test_a_source_that_stays_away_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restoring, "SOURCE_AWAY_S", 0.5)
    source, out = Source(tmp_path / "anchor", random.Random(12)), tmp_path / "out"

    async def work() -> None:
        fetching = asyncio.create_task(fetched(source, out, await source.start()))
        while len(source.asked) < 3:
            await asyncio.sleep(0)
        source.breaks = 1.0
        await source.server.stop()
        await fetching

    with pytest.raises(PeerLost, match="did not come back within .* start this worker again with the same --out"):
        run(work())
