"""Pacing: no more than the rate allows in any time, nothing lost below it, fair in order; and limits read as they are meant."""

from __future__ import annotations

import asyncio
import itertools
import time
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_core.errors import UserError
from swarm_core.wire.frames import (
    CHUNK_BYTES,
    CHUNK_UNIT_BYTES,
    FRAME_OVERHEAD,
    Assembler,
    Frame,
    Header,
    message_bytes,
)
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import FrameKind, Report
from swarm_core.wire.pacing import NO_LIMITS, Limits, Pace, TokenBucket, line_bytes, read_limits
from swarm_core.wire.streams import FrameStream, Server, dial

STEPS = st.lists(st.tuples(st.floats(0, 3), st.integers(0, 4000)), min_size=1, max_size=30)


def sends(bucket: TokenBucket, steps: list[tuple[float, int]], *, waiting: bool) -> list[tuple[float, int]]:
    """(when, bytes) of everything that goes; `waiting`: one link that waits before it asks again, or many at once."""
    now, gone = 0.0, []
    for idle_s, n in steps:
        now += idle_s
        at = now + bucket.reserve(n, now)
        gone.append((at, n))
        now = at if waiting else now
    return gone


@settings(derandomize=True, max_examples=100)
@given(STEPS, st.floats(1, 5000), st.floats(0, 3000), st.booleans())
def test_no_time_sees_more_than_its_rate_and_one_burst(
    steps: list[tuple[float, int]], rate: float, burst: float, waiting: bool
) -> None:
    gone = sends(TokenBucket(rate, burst), steps, waiting=waiting)
    times = [at for at, _ in gone]
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(times)), "served in the order they came, but for rounding"
    for first in range(len(gone)):
        for last, total in enumerate(accumulate(n for _, n in gone[first:])):
            # what a window begins with may have been waiting for its tokens: the window is open to the left
            since = gone[first - 1][0] if first else 0.0
            time_s = gone[first + last][0] - since
            assert total <= rate * time_s + burst + 1e-6 * (1 + total)


@settings(derandomize=True, max_examples=200)
@given(st.lists(st.integers(1, 4000), min_size=5, max_size=40), st.floats(10, 5000), st.floats(0, 0.5))
def test_whoever_always_has_something_gets_the_whole_rate(sizes: list[int], rate: float, late_s: float) -> None:
    """Also where a timer wakes late, as long as a burst makes up for it."""
    bucket = TokenBucket(rate, rate * late_s)
    bucket.reserve(int(rate * late_s) + 1, 0.0)  # spend the first burst
    now = 0.0
    for n in sizes:
        wait_s = bucket.reserve(n, now)
        now += wait_s + (late_s if wait_s > 0 else 0.0)
    assert now <= (sum(sizes) + 1) / rate + late_s + 1e-6 * now


def test_an_idle_bucket_holds_one_burst_and_no_more() -> None:
    bucket = TokenBucket(1000, 500)
    assert bucket.reserve(500, 0.0) == 0
    assert bucket.reserve(250, 0.0) == 0.25
    assert bucket.reserve(500, 3600.0) == 0
    assert bucket.reserve(1000, 3600.0) == 1.0
    assert bucket.reserve(0, 3600.5) == 0.5


@pytest.mark.parametrize(("text", "up", "down"), [("50", 50, 50), ("50:200", 50, 200), ("0.5:1e3", 0.5, 1000)])
def test_limits_are_read_up_then_down(text: str, up: float, down: float) -> None:
    limits = read_limits(text)
    assert limits.up and limits.down and limits.up is not limits.down
    assert (limits.up.bucket.bytes_per_s, limits.down.bucket.bytes_per_s) == (up * 125_000, down * 125_000)


def test_no_limit_is_none() -> None:
    assert read_limits(None) is NO_LIMITS and NO_LIMITS == Limits(None, None)


@pytest.mark.parametrize(
    "text", ["", ":", "50:", ":50", "fast", "0", "-1", "50:0", "nan", "inf", "1:2:3", "50 Mbit", "0.001"]
)
def test_what_is_no_limit_is_said_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match="--limit-mbps .* wanted Mbit/s .* 50:200") as caught:
        read_limits(text)
    assert "\n" not in str(caught.value) and repr(text) in str(caught.value)


@pytest.mark.parametrize("mbps", [0.01, 1, 6.5, 7, 50, 100, 420, 1000, 1e6])
def test_chunks_under_a_limit_are_short_and_valid(mbps: float) -> None:
    pace = Pace(mbps)
    assert pace.chunk_bytes % CHUNK_UNIT_BYTES == 0 and CHUNK_UNIT_BYTES <= pace.chunk_bytes <= CHUNK_BYTES
    assert pace.chunk_bytes == CHUNK_UNIT_BYTES or pace.chunk_bytes * 8 <= mbps * 1e6 * 0.02
    assert pace.bucket.burst_bytes < 1.1 * pace.chunk_bytes


class Line:
    """A stream over nothing; `at` says when each message was written."""

    def __init__(self, limits: Limits, inbound: tuple[bytes, ...] = ()) -> None:
        self.ledger = Ledger()
        self.messages: list[bytes] = []
        self._inbound = iter(inbound)
        self.stream = FrameStream(self._read, self._write, self.ledger, "peer").name("a-b", "down").pace(limits)
        self.stream.bound(lambda _: 1 << 26)

    async def _write(self, message: bytes) -> None:
        self.messages.append(message)

    async def _read(self) -> bytes:
        return next(self._inbound)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only sleeping moves; the list's one number is the time."""
    now = [0.0]

    async def sleep(seconds: float, result: Any = None) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(asyncio, "sleep", sleep)
    return now


def test_a_frame_is_sent_at_the_rate_of_the_line_and_links_share_it(clock: list[float]) -> None:
    limits = read_limits("8")  # 1 MB/s
    assert limits.up is not None
    one, other = Line(limits), Line(limits)
    frame = Frame(Header(FrameKind.ACTIVATION), bytes(500_000))
    asyncio.run(one.stream.send(frame))
    asyncio.run(other.stream.send(frame))
    messages = [*one.messages, *other.messages]
    cost = sum(line_bytes(len(m)) for m in messages)
    assert clock[0] == pytest.approx((cost - limits.up.bucket.burst_bytes) / 1e6, rel=1e-6)
    assert 1.04 < cost / 1e6 < 1.06, "headers of the line are counted"
    assert all(len(m) <= limits.up.chunk_bytes + FRAME_OVERHEAD for m in messages)
    assembler = Assembler({FrameKind.ACTIVATION: 1 << 20})
    (back,) = [f for m in one.messages if (f := assembler.feed(m)) is not None]
    assert bytes(back.payload) == frame.payload
    assert one.ledger.take()[0].message_bytes == sum(map(len, one.messages))


def test_a_report_in_usual_chunks_is_paced_and_counts_itself(clock: list[float]) -> None:
    line = Line(read_limits("0.1"))
    report = Report("ledger", 1, words={"text": "x" * 50_000})
    asyncio.run(line.stream.send_report(report, 1))
    assert len(line.messages) == 1 and clock[0] > 2
    assert report.ledger[0].message_bytes + report.ledger[-1].message_bytes >= len(line.messages[0])


def test_reading_waits_for_what_came_in(clock: list[float]) -> None:
    sender, frame = Line(NO_LIMITS), Frame(Header(FrameKind.GRADIENT), bytes(3 << 20))
    asyncio.run(sender.stream.send(frame))
    reader = Line(Limits(down=Pace(8)), tuple(sender.messages))
    received = asyncio.run(reader.stream.receive())
    assert received is not None and bytes(received.payload) == frame.payload
    assert clock[0] == pytest.approx(sum(line_bytes(len(m)) for m in sender.messages) / 1e6, rel=0.02)


class Noted(Pace):
    """Lets everything through at once and keeps the sizes."""

    def __init__(self, mbps: float) -> None:
        super().__init__(mbps)
        self.taken: list[int] = []

    async def take(self, message_bytes: int) -> None:
        self.taken.append(message_bytes)


def test_the_links_that_a_server_takes_in_keep_to_its_limits() -> None:
    up, down, size = Noted(400), Noted(400), 3 << 20

    async def echo(stream: FrameStream) -> None:
        stream.bound(lambda _: 1 << 26)
        frame = await stream.receive()
        assert frame is not None
        await stream.send(frame)

    async def work() -> None:
        server = Server("Stage", {"Link": echo}, Ledger())
        server.limits = Limits(up, down)
        stream = await dial(await server.start("127.0.0.1:0"), "Stage/Link", Ledger(), "stage 1", 5.0)
        stream.bound(lambda _: 1 << 26)
        await stream.send(Frame(Header(FrameKind.GRADIENT), bytes(size)))
        frame = await stream.receive()
        assert frame is not None and bytes(frame.payload) == bytes(size)
        await stream.finish()
        await server.stop()

    asyncio.run(asyncio.wait_for(work(), timeout=20))
    assert sum(down.taken) == message_bytes(size)
    assert sum(up.taken) == message_bytes(size, up.chunk_bytes) and len(up.taken) == 4
