"""The anchor's streams: stage workers and samplers attend, report and are told. Decides nothing a tick would wait for."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from anchor_node.books import Books
from anchor_node.calibrator import BasisKeeper, basis_set, part_for_stage
from anchor_node.checkpoints import Checkpoint, complete
from anchor_node.roster import Member, Roster
from swarm_core.manifest import Manifest
from swarm_core.wire.errors import BadFrame, PeerLost
from swarm_core.wire.frames import Frame, Header, run_id
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import (
    FrameKind,
    Hello,
    Ready,
    Report,
    Saved,
    Sketch,
    Start,
    Stop,
    Welcome,
    from_bytes,
    to_bytes,
)
from swarm_core.wire.streams import FrameStream, Server

log = logging.getLogger(__name__)
LIMITS = {FrameKind.SKETCH: 256 << 20, FrameKind.REPORT: 16 << 20}


class Screen(Protocol):
    """Where people look on: the live table, or plain lines."""

    def update(self, row: dict[str, Any]) -> None: ...


@dataclass
class _Ending:
    """What is still missing before the run is over."""

    tick: int
    evaluation: bool
    checkpoint: bool


class AnchorService:
    """One run, from the first HELLO to STOP. `over` resolves with the reason of the end, or fails with what broke."""

    def __init__(
        self,
        manifest: Manifest,
        books: Books,
        keeper: BasisKeeper | None,
        screen: Screen,
        out: Path,
        resume: Checkpoint | None,
        ledger: Ledger,
    ) -> None:
        self.manifest = manifest
        self.digest = manifest.digest()
        self.roster = Roster(manifest.stages, self.digest, manifest.model_fingerprint)
        self.books, self.keeper, self.screen, self.out, self.resume = books, keeper, screen, out, resume
        self.ledger = ledger
        self.tick = resume.tick if resume else 0
        self._open = asyncio.Event()
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.server = Server("Anchor", {"Attend": self._attend, "Sample": self._sample}, ledger)
        self._stages: dict[int, FrameStream] = {}
        self._samplers: list[FrameStream] = []
        self._ending: _Ending | None = None
        self._reason = "the run has reached its last tick"
        self._draining = False
        self._saved_tick = -1
        self._gone = asyncio.Condition()

    @property
    def _run(self) -> int:
        return run_id(self.digest)

    def open(self) -> None:
        """Answer those who have dialled; until now they wait (version 0 of the bases was being made)."""
        self._open.set()

    # Stage workers -----------------------------------------------------------------------------------------------------

    async def _attend(self, stream: FrameStream) -> None:
        hello = from_bytes(Hello, (await stream.expect(FrameKind.HELLO)).payload)
        await self._open.wait()
        member = self.roster.join(hello)
        stage = member.stage
        stream.name(f"anchor-stage{stage}", "down", LIMITS)
        stream.peer = f"stage {stage} at {hello.address}"
        self._stages[stage] = stream
        log.info("stage %d joined from %s", stage, hello.address)
        try:
            await self._send(stream, FrameKind.WELCOME, self._welcome())
            while (frame := await stream.receive()) is not None:
                await self._from_stage(member, frame)
        except BadFrame as error:
            self._lost(f"{stream.peer} was refused: {error}")
            raise
        finally:
            self.roster.leave(member)
            self._stages.pop(stage, None)
            self._lost(f"{stream.peer} went away at tick {self.tick}")
            async with self._gone:
                self._gone.notify_all()

    async def _from_stage(self, member: Member, frame: Frame) -> None:
        match frame.header.kind:
            case FrameKind.READY:
                if self.roster.is_ready(member, from_bytes(Ready, frame.payload)):
                    await self._start()
                else:
                    missing = ", ".join(map(str, self.roster.missing()))
                    self.event("ready", f"stage {member.stage}; still to come: stages {missing}")
            case FrameKind.REPORT:
                self._note(from_bytes(Report, frame.payload))
            case FrameKind.SKETCH:
                await self._take_sketch(from_bytes(Sketch, frame.payload))
            case FrameKind.SAVED:
                self._take_saved(member.stage, from_bytes(Saved, frame.payload))
            case FrameKind.STOP:
                await self.drain(from_bytes(Stop, frame.payload).reason)
            case kind:
                raise BadFrame(f"stage {member.stage} sent {kind.name}")

    async def _start(self) -> None:
        start = Start(epoch=self.roster.epoch, stage_addresses=self.roster.addresses())
        if self.resume is not None:
            start.checkpoint = self.resume.name
            start.shard_digests = {stage: saved.digest for stage, saved in self.resume.shards.items()}
        log.info("all %d stages are ready: starting at tick %d", self.manifest.stages, self.tick)
        for stage, stream in self._stages.items():
            if self.keeper is not None:
                bases = basis_set(self.keeper.version, self.tick, self.keeper.bases)
                await self._send(stream, FrameKind.BASIS, part_for_stage(bases, stage))
            await self._send(stream, FrameKind.START, start)
        for stream in self._samplers:
            await self._start_sampler(stream)
        self.event("start", f"{self.manifest.stages} stages")

    # Samplers ----------------------------------------------------------------------------------------------------------

    async def _sample(self, stream: FrameStream) -> None:
        hello = from_bytes(Hello, (await stream.expect(FrameKind.HELLO)).payload)
        await self._open.wait()
        self.roster.greet(hello)
        stream.name("anchor-sampler", "down", LIMITS)
        stream.peer = "the sampler"
        try:
            await self._send(stream, FrameKind.WELCOME, self._welcome())
            await stream.expect(FrameKind.READY)
            self._samplers.append(stream)
            self.event("ready", "a sampler")
            if self.roster.started:
                await self._start_sampler(stream)
            while (frame := await stream.receive()) is not None:
                if frame.header.kind is FrameKind.REPORT:
                    self._note(from_bytes(Report, frame.payload))
                elif frame.header.kind is FrameKind.STOP:
                    await self.drain(from_bytes(Stop, frame.payload).reason)
                else:
                    raise BadFrame(f"a sampler sent {frame.header.kind.name}")
        finally:
            if stream in self._samplers:
                self._samplers.remove(stream)
                if self._ending is None:
                    self.event("sampler", "the sampler went away; ticks go on while there are rollouts")
            async with self._gone:
                self._gone.notify_all()

    async def _start_sampler(self, stream: FrameStream) -> None:
        if self.keeper is not None:
            bases = basis_set(self.keeper.version, self.tick, self.keeper.bases)
            await self._send(stream, FrameKind.BASIS, bases)
        start = Start(epoch=self.roster.epoch, stage_addresses=self.roster.addresses())
        start.checkpoint = self.resume.name if self.resume else ""
        await self._send(stream, FrameKind.START, start)

    # What is reported --------------------------------------------------------------------------------------------------

    def _note(self, report: Report) -> None:
        row = self.books.report(report)
        if row is None:
            return
        if report.type == "tick":
            self.tick = max(self.tick, report.tick + 1)
            dense, packet = self.books.by_tick.pop(report.tick - 1, (0, 0))
            if dense:  # the previous tick's: its last rows arrive after its metrics
                row["bytes/links_previous_tick"], row["bytes/share_of_dense"] = packet, packet / dense
        if report.words.get("event") == "finished":
            evaluation = report.words.get("evaluation") == "yes"
            self._ending = _Ending(report.tick, evaluation, checkpoint=self._saved_tick < report.tick)
            self._reason = report.words.get("message", self._reason)
        if report.type == "eval" and self._ending is not None and report.tick >= self._ending.tick:
            self._ending.evaluation = False
        self.screen.update(row)
        self._maybe_over()

    async def _take_sketch(self, sketch: Sketch) -> None:
        if self.keeper is None:
            raise BadFrame("a sketch came, but these links have no basis")
        new = self.keeper.add(sketch)
        if new is None:
            return
        for stage, stream in list(self._stages.items()):
            await self._send(stream, FrameKind.BASIS, part_for_stage(new, stage))
        for stream in self._samplers:
            await self._send(stream, FrameKind.BASIS, new)
        numbers = {
            f"basis/overlap_{direction.name.lower()}/boundary_{boundary}": value
            for (boundary, direction), value in self.keeper.overlap.items()
        }
        lowest = min(numbers.values())
        self.event("basis", f"version {new.version}, overlap with the last one >= {lowest:.3f}", numbers)

    def _take_saved(self, stage: int, saved: Saved) -> None:
        shards = self.roster.saved(stage, saved)
        if shards is None:
            return
        bases = (self.keeper.version, self.keeper.bases) if self.keeper is not None else None
        keep = self.manifest.config.checkpoint.keep
        made = complete(self.out, saved.checkpoint, self.digest, shards, keep, bases)
        self.event("checkpoint", f"{made.name}, {sum(s.bytes for s in shards.values()) / 1e6:.1f} MB")
        self._saved_tick = saved.tick
        if self._ending is not None and saved.tick >= self._ending.tick:
            self._ending.checkpoint = False
        self._maybe_over()

    def event(self, name: str, message: str, numbers: dict[str, float] | None = None) -> None:
        """An event row, for the books and the screen."""
        log.info("%s: %s", name, message)
        self.screen.update(self.books.row("event", self.tick, {"event": name, "message": message, **(numbers or {})}))

    # The end -----------------------------------------------------------------------------------------------------------

    async def drain(self, reason: str) -> None:
        """Ask stage 0 to stop after its tick, with a checkpoint. Before the start there is nothing to save."""
        if self._draining:
            return
        self._draining = True
        self._reason = reason
        self.event("stop", reason)
        if self.roster.started and 0 in self._stages:
            await self._send(self._stages[0], FrameKind.STOP, Stop(reason))
        elif not self.over.done():
            self.over.set_result(reason)

    def _lost(self, message: str) -> None:
        if self.roster.started and not self.over.done() and (self._ending is None or self._ending.checkpoint):
            self.over.set_exception(PeerLost(message))

    def _maybe_over(self) -> None:
        e = self._ending
        if e is not None and not self.over.done() and not e.checkpoint and (not e.evaluation or not self._samplers):
            self.over.set_result(self._reason)

    async def close(self) -> None:
        """Send everybody home, take their last reports, and close the books."""
        everyone = [*self._stages.values(), *self._samplers]
        for stream in everyone:
            try:
                await self._send(stream, FrameKind.STOP, Stop(self._reason, now=True))
            except PeerLost:
                continue
        try:
            async with self._gone:
                everybody_left = self._gone.wait_for(lambda: not self._stages and not self._samplers)
                await asyncio.wait_for(everybody_left, timeout=10.0)
        except TimeoutError:
            log.warning("not everybody left within 10 s: %s", [s.peer for s in everyone])
        await self.server.stop()
        self.books.ledger(self.ledger.take())

    def _welcome(self) -> Welcome:
        return Welcome(self.manifest.to_json(), self.digest, self.roster.epoch)

    async def _send(self, stream: FrameStream, kind: FrameKind, message: Any) -> None:
        await stream.send(Frame(Header(kind, self._run, self.roster.epoch, self.tick), to_bytes(message)))
