"""The stream to the anchor for the life of a run: it breaks and comes back, and nothing that trains waits for it.

Posting returns at once and never fails. What is posted differs in what becomes of it when the stream breaks:

    reports         are numbered, kept until the anchor says that they are in its books, and sent again after a return: what
                    a restarted anchor has already it drops by number, so that a row is neither lost nor doubled
    SAVED, STOP     mean the same when they are said twice, and are said again after every return, the newest of them
    SKETCH, SLICE   wait for the return, those of the newest tick
    anything else   is dropped; `on_return` tells its sender to begin again

What a process counts in its byte ledger travels with its reports. A long outage costs a stage about a report and ten
ledger rows a tick. No message of the anchor is interpreted here but BOOKED and the last STOP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from swarm_core.wire.errors import PeerLost, Refused, WireError
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.messages import Booked, FrameKind, Hello, Report, Stop, from_bytes
from swarm_core.wire.streams import Dialled
from swarm_worker.membership import LAST_WORDS_S, Greeted, Membership, failed_report, greet

log = logging.getLogger(__name__)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 5.0  # before dialling again; below the grace that the anchor gives (absences.py)
DIAL_S = 5.0  # for one connection: a machine that is gone does not even refuse
WELCOME_S = 30.0  # a restarted anchor may be reading its bases
CLOSE_S = 5.0  # for the anchor to read the last frame and to close its side
END_WAIT_S = 600.0  # for an anchor that is away when the run ends: without it the last checkpoint is not complete
INBOX = 4  # frames from the anchor that wait to be taken in: bases and corrections are large
NEWEST = (FrameKind.SKETCH, FrameKind.SLICE)


@dataclass(frozen=True)
class Standing:
    """Where a member at work stands, as it says when it comes back."""

    epoch: int = 0
    tick: int = 0
    basis_version: int = 0
    stalled: bool = False  # it waits for another epoch


class AnchorLink:
    """One member's stream to the anchor, and the streams that follow it.

    `standing` is asked at every return. Of its own checkpoints a member names the newest `checkpoints` again (0: all).
    """

    def __init__(self, membership: Membership, standing: Callable[[], Standing], checkpoints: int = 0) -> None:
        self.address = membership.way.address
        self.away_since: float | None = None  # on the monotonic clock
        self.on_return: list[Callable[[], None]] = []
        self._way, self._digest = membership.way, membership.digest
        self._standing = standing
        self._stream: Dialled | None = membership.anchor
        self._limits = membership.anchor.limits
        self._queue: deque[Frame | Report] = deque()  # in the order of posting
        self._again: deque[Frame] = deque()  # reports of an earlier stream, which go first
        self._unbooked: deque[tuple[int, Frame]] = deque()
        self._number = 0  # of the newest report that was sent
        self._ledger_tick: int | None = None  # a report of ledger rows is due, behind the queue; one says it all
        self._saved: deque[Frame] = deque(maxlen=checkpoints or None)
        self._stop: Frame | None = None
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()  # nothing is left to send, and all reports are booked
        self._inbox: asyncio.Queue[Frame | None] = asyncio.Queue(INBOX)
        self._ended = asyncio.Event()
        self._leaving = self._told_to_leave = False
        self._reader: asyncio.Task[object] | None = None
        self._wait_s = 0.0
        self.end_wait_s = END_WAIT_S

    # For those who post ------------------------------------------------------------------------------------------------

    def post(self, frame: Frame) -> None:
        """Queue a frame (see above for which of them survive an outage)."""
        kind, tick = frame.header.kind, frame.header.tick
        if kind is FrameKind.SAVED:
            others = (old for old in self._saved if old.header.tick != tick)
            self._saved = deque([*others, frame], self._saved.maxlen)
        elif kind is FrameKind.STOP:
            self._stop = frame
        elif kind in NEWEST:
            self._drop(lambda old: old.header.kind is kind and old.header.tick < tick)
        self._queue.append(frame)
        self._due()

    def forget_saved(self, tick: int) -> None:
        """This member goes on from that tick: of its shards of later ones nothing is said again."""
        self._saved = deque((old for old in self._saved if old.header.tick <= tick), self._saved.maxlen)

    def post_report(self, report: Report) -> None:
        """Queue a report; it takes the ledger's rows with it when its turn comes."""
        if report.type == "ledger":
            self._ledger_tick = report.tick
        else:
            self._queue.append(report)
        self._due()

    def take_wait_s(self) -> float:
        """Seconds since the last call that anybody but the one reader has awaited something of this link.

        Posting cannot be awaited, so that this is 0 as long as no tick path waits for the anchor.
        """
        waited_s, self._wait_s = self._wait_s, 0.0
        return waited_s

    def _due(self) -> None:
        self._settled.clear()
        self._wake.set()

    def _drop(self, which: Callable[[Frame], bool]) -> None:
        self._queue = deque(item for item in self._queue if isinstance(item, Report) or not which(item))

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            if asyncio.current_task() is not self._reader:
                self._wait_s += time.monotonic() - started

    # For whoever reads, and at the end -----------------------------------------------------------------------------------

    async def receive(self) -> Frame | None:
        """The next frame from the anchor, however many streams it takes; None once this member has left. One task reads."""
        self._reader = self._reader or asyncio.current_task()
        with self._counted():
            return await self._inbox.get()

    async def away_for(self, wait_s: float) -> None:
        """Return when the anchor has been away for `wait_s` without a break, counted from now."""
        with self._counted():
            called = time.monotonic()
            while self.away_since is None or time.monotonic() - max(called, self.away_since) < wait_s:
                await asyncio.sleep(min(1.0, wait_s))

    async def leave(self, wait_s: float) -> bool:
        """Wait until everything posted is in the anchor's books, then close. False: `wait_s` was not enough for that."""
        if self._stream is not None:
            self._stream.heart.stop()  # what it would count now, no report would carry
        with self._counted():
            try:
                async with asyncio.timeout(wait_s):
                    await self._settled.wait()
            except TimeoutError:
                return False
            self._leaving = True
            if self._stream is not None:
                with contextlib.suppress(WireError, TimeoutError):
                    async with asyncio.timeout(CLOSE_S):
                        await self._stream.done()
                        await self._ended.wait()
            return True

    async def last_words(self, who: str, error: Exception) -> None:
        """Say why this process ends before its time; nobody could tell it from a stream that broke."""
        self.post_report(failed_report(who, error))
        with self._counted(), contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self._settled.wait()

    # The streams, one after the other ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until this member leaves. Raises Refused for a frame of ours that the anchor does not take."""
        stream = self._stream
        assert stream is not None
        try:
            while True:
                broke = await self._serve(stream)
                self._stream = None
                await stream.close()
                if self._leaving:
                    return
                self.away_since = time.monotonic()
                log.warning("the anchor at %s is away (%s): work goes on, and it is dialled again", self.address, broke)
                stream, welcome = await self._come_back()
                away_s, self.away_since = time.monotonic() - self.away_since, None
                self._resume(welcome.booked)
                log.warning("the anchor is back after %.1f s; %d reports go again", away_s, len(self._again))
                self._stream = stream
        finally:
            self._ended.set()
            if self._stream is not None:
                await self._stream.close()

    async def _serve(self, stream: Dialled) -> PeerLost:
        """Read and write until the stream breaks; what broke it."""
        self._wake.set()
        tasks = [asyncio.create_task(self._read(stream)), asyncio.create_task(self._write(stream))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        errors = [end for end in ends if isinstance(end, Exception)]
        for error in errors:
            if not isinstance(error, PeerLost):
                raise error
        return errors[0] if errors else PeerLost("it closed the stream")  # type: ignore[return-value]

    async def _read(self, stream: Dialled) -> None:
        while (frame := await stream.receive()) is not None:
            if frame.header.kind is FrameKind.BOOKED:
                self._booked(from_bytes(Booked, frame.payload).number)
            elif not self._told_to_leave:  # afterwards nobody takes anything any more
                self._told_to_leave = frame.header.kind is FrameKind.STOP and from_bytes(Stop, frame.payload).now
                await self._inbox.put(frame)

    async def _write(self, stream: Dialled) -> None:
        while True:
            self._wake.clear()
            while self._again or self._queue or self._ledger_tick is not None:
                item: Frame | Report
                if self._again:
                    item = self._again.popleft()
                elif self._queue:
                    item = self._queue.popleft()
                else:
                    item = Report("ledger", self._ledger_tick or 0)
                    self._ledger_tick = None
                if isinstance(item, Report):
                    await stream.send(self._seal(stream, item), count=False)
                else:
                    await stream.send(item)
            self._check_settled()
            await self._wake.wait()

    def _seal(self, stream: Dialled, report: Report) -> Frame:
        """Number a report and give it its ledger rows: from here on it is these bytes, however often it is sent."""
        self._number += 1
        report.number = self._number
        ledger = self._way.ledger
        frame = Frame(
            Header(FrameKind.REPORT, tick=report.tick),
            ledger.take_report(report, report.tick, stream.link, stream.direction),
        )
        self._unbooked.append((report.number, frame))
        if ledger.waiting:
            self._ledger_tick = report.tick  # there were more than one report takes
        return frame

    def _booked(self, number: int) -> None:
        while self._unbooked and self._unbooked[0][0] <= number:
            self._unbooked.popleft()
        self._check_settled()

    def _check_settled(self) -> None:
        if not (self._again or self._queue or self._unbooked or self._ledger_tick is not None):
            self._settled.set()

    # Coming back -------------------------------------------------------------------------------------------------------

    async def _come_back(self) -> Greeted:
        pause_s, said = FIRST_PAUSE_S, ""
        while True:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            try:
                async with asyncio.timeout(WELCOME_S):
                    stream, welcome = await greet(self._way, self._hello_again, DIAL_S)
            except Refused as error:
                if str(error) != said:
                    log.warning(
                        "the anchor at %s does not take us back, which we go on asking for: %s", self.address, error
                    )
                said = str(error)
            except (WireError, TimeoutError):
                continue
            else:
                stream.pace(self._limits)
                return stream, welcome

    def _hello_again(self) -> Hello:
        return replace(self._way.hello, manifest_digest=self._digest, at_work=True, **vars(self._standing()))

    def _resume(self, booked: int) -> None:
        """The next stream begins with what the last one may have lost."""
        self._booked(booked)
        self._again = deque(frame for _, frame in self._unbooked)
        self._drop(lambda old: old.header.kind not in NEWEST)
        self._queue += [*self._saved, *([self._stop] if self._stop is not None else [])]
        for begin_again in self.on_return:
            begin_again()
        self._due()
