"""The ledger: rows add up to the bytes that really went, the report that carries them included."""

from __future__ import annotations

import asyncio
import random
from dataclasses import fields

import pytest

from swarm_core.wire.frames import CHUNK_BYTES, Assembler, Frame, Header, message_bytes
from swarm_core.wire.framing import OPENING, OPENING_TLS, Wire, frame_wire
from swarm_core.wire.ledger import COLUMNS, KIND_OF, Ledger
from swarm_core.wire.messages import FrameKind, LedgerRow, Report, from_bytes, to_bytes
from swarm_core.wire.streams import FrameStream

LIMITS = {kind: 1 << 26 for kind in FrameKind}
OTHERS = [kind for kind in FrameKind if kind is not FrameKind.REPORT]


class Tap:
    """A stream whose bytes are kept."""

    def __init__(self, ledger: Ledger) -> None:
        self.messages: list[bytes] = []
        self.stream = FrameStream(self._read, self._write, ledger, "peer").name("a-b", "down")

    async def _write(self, message: bytes) -> None:
        self.messages.append(message)

    async def _read(self) -> bytes:
        raise AssertionError("nobody reads here")

    def frames(self) -> list[Frame]:
        assembler = Assembler(LIMITS)
        return [frame for message in self.messages if (frame := assembler.feed(message)) is not None]


def test_one_frame_of_every_kind_lands_in_its_row() -> None:
    ledger = Ledger()
    wire = Tap(ledger)

    async def send() -> None:
        for kind in FrameKind:
            await wire.stream.send(Frame(Header(kind, tick=3), bytes(kind), dense_bytes=1000 + kind))

    asyncio.run(send())
    rows = {row.kind: row for row in ledger.take() if row.frames}
    for kind in FrameKind:
        row = rows[KIND_OF.get(kind, "control")]
        assert (row.tick, row.link, row.direction) == (3, "a-b", "down") and row.kind in {*KIND_OF.values(), "control"}
    assert sum(row.frames for row in rows.values()) == len(FrameKind)
    assert sum(row.packet_bytes for row in rows.values()) == sum(FrameKind)
    assert sum(row.dense_bytes for row in rows.values()) == sum(1000 + kind for kind in FrameKind)
    assert sum(row.message_bytes for row in rows.values()) == sum(map(len, wire.messages))
    assert rows["activation"].packet_bytes == FrameKind.ACTIVATION
    assert ledger.take() == []


def test_dense_is_the_payload_where_there_is_no_tensor() -> None:
    ledger = Ledger()
    ledger.count(0, "a-b", "up", FrameKind.VOTE, dense=None, packet=70, message=200)
    ledger.count(0, "a-b", "up", FrameKind.GRADIENT, dense=0, packet=50, message=180)
    control, gradient = (row for row in ledger.take() if row.frames)
    assert (control.dense_bytes, gradient.dense_bytes) == (70, 0)


def test_rows_are_sums_in_order_and_a_row_has_the_columns() -> None:
    ledger = Ledger()
    for tick, link in ((2, "b"), (1, "b"), (1, "a"), (1, "a")):
        ledger.count(tick, link, "down", FrameKind.BATCH, dense=None, packet=10, message=20)
    rows = [row for row in ledger.take() if row.frames]
    assert [(r.tick, r.link, r.packet_bytes, r.message_bytes, r.frames) for r in rows] == [
        (1, "a", 20, 40, 2),
        (1, "b", 10, 20, 1),
        (2, "b", 10, 20, 1),
    ]
    assert {f.name for f in fields(LedgerRow)} == set(COLUMNS)


def test_the_answer_to_a_frame_stands_in_the_other_direction() -> None:
    ledger = Ledger()
    ledger.count(4, "a-b", "down", FrameKind.ACTIVATION, dense=None, packet=8192, message=8292)
    ledger.count(4, "a-b", "down", FrameKind.WEIGHTS, dense=None, packet=5 << 20, message=(5 << 20) + 500)
    activation, weights, answer = ledger.take()
    small, chunks = frame_wire(8292), frame_wire((5 << 20) + 500, 5)
    assert (activation.wire_bytes, weights.wire_bytes) == (small.sent, chunks.sent)
    assert answer == LedgerRow(4, "a-b", "up", "control", wire_bytes=small.answered + chunks.answered)


@pytest.mark.parametrize(("tls", "opening"), [(False, OPENING), (True, OPENING_TLS)])
def test_a_stream_pays_for_its_connection_once(tls: bool, opening: Wire) -> None:
    ledger = Ledger(tls=tls)
    for kind in (FrameKind.HELLO, FrameKind.FETCH):
        ledger.count(0, "a-b", "down", kind, dense=None, packet=0, message=100)
        down, up = ledger.take()
        assert Wire(down.wire_bytes, up.wire_bytes) == frame_wire(100, tls=tls).plus(
            opening if kind is FrameKind.HELLO else Wire(0, 0)
        )


@pytest.mark.parametrize("seed", range(20))
def test_a_report_counts_itself_exactly(seed: int) -> None:
    rng = random.Random(seed)
    ledger = Ledger()
    wire = Tap(ledger)
    reports = rng.randint(1, 4)

    async def send() -> None:
        for _ in range(reports):
            for _ in range(rng.randint(0, 30)):
                kind, size = rng.choice(OTHERS), rng.choice((0, 1, 500, CHUNK_BYTES + 3))
                await wire.stream.send(Frame(Header(kind, tick=rng.randint(0, 2)), bytes(size)))
            report = Report("ledger", 2, {"x": rng.random()}, {"word": "é" * rng.randint(0, 300)})
            await wire.stream.send_report(report, rng.randint(0, 3))

    asyncio.run(send())
    arrived = [from_bytes(Report, f.payload) for f in wire.frames() if f.header.kind is FrameKind.REPORT]
    rows = [row for report in arrived for row in report.ledger]
    assert sum(row.message_bytes for row in rows) == sum(map(len, wire.messages))
    assert sum(row.packet_bytes for row in rows) == sum(memoryview(f.payload).nbytes for f in wire.frames())
    assert sum(row.frames for row in rows) == len(wire.frames())
    assert sum(row.wire_bytes for row in rows if row.direction == "down") > sum(map(len, wire.messages))
    assert all(row.wire_bytes > row.message_bytes for row in rows)
    assert ledger.take() == []


def test_a_report_of_several_chunks_counts_itself_too() -> None:
    ledger = Ledger()
    wire = Tap(ledger)
    for tick in range(20_000):
        ledger.count(tick, "stage0-stage1", "down", FrameKind.ACTIVATION, dense=4, packet=3, message=5)
    asyncio.run(wire.stream.send_report(Report("ledger", 1), 1))
    (frame,) = wire.frames()
    report = from_bytes(Report, frame.payload)
    own = [row for row in report.ledger if row.kind == "control" and row.direction == "down"]
    assert len(wire.messages) > 1
    assert [(r.frames, r.message_bytes) for r in own] == [(1, sum(map(len, wire.messages)))]
    assert own[0].packet_bytes == len(to_bytes(report)) == memoryview(frame.payload).nbytes
    assert own[0].message_bytes == message_bytes(own[0].packet_bytes)
    counted = frame_wire(own[0].message_bytes, len(wire.messages), alone=True)
    assert own[0].wire_bytes == counted.sent
