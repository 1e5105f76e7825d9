"""The anchor's streams: stage workers and samplers attend, report and are told. Decides nothing a tick would wait for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from anchor_node.books import Books
from anchor_node.calibrator import BasisKeeper, part_for_stage
from anchor_node.checkpoints import Checkpoint, complete, set_later_aside
from anchor_node.corrector import Corrector
from anchor_node.roster import Member, Roster
from codec.fit import Fit
from swarm_core.manifest import Manifest
from swarm_core.wire.bases import Key
from swarm_core.wire.errors import BadFrame, PeerLost, Refused
from swarm_core.wire.frames import Frame, Header, run_id
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import (
    Correction,
    FrameKind,
    Hello,
    Ready,
    Report,
    Saved,
    Sketch,
    Slice,
    Snapshot,
    Start,
    Stop,
    Welcome,
    from_bytes,
    to_bytes,
)
from swarm_core.wire.outbox import Outbox
from swarm_core.wire.streams import FrameStream, Server

log = logging.getLogger(__name__)
LIMITS = {FrameKind.SKETCH: 256 << 20, FrameKind.REPORT: 16 << 20}


class Screen(Protocol):
    """Where people look on: the live table, or plain lines."""

    def update(self, row: dict[str, Any]) -> None: ...

    def bytes_update(self, totals: dict[str, list[int]]) -> None: ...


EVALUATION = "evaluation"


class AnchorService:
    """One run, from the first HELLO to STOP. `over` resolves with the reason of the end, or fails with what broke.

    `books` are opened once the server has bound, `keeper` comes with the first bases, both before `open`.
    """

    books: Books

    def __init__(
        self,
        manifest: Manifest,
        screen: Screen,
        out: Path,
        resume: Checkpoint | None,
        ledger: Ledger,
    ) -> None:
        self.manifest = manifest
        self.digest = manifest.digest()
        self.roster = Roster(manifest.stages, self.digest, manifest.model_fingerprint)
        self.screen, self.out, self.resume, self.ledger = screen, out, resume, ledger
        self.keeper: BasisKeeper | None = None
        self.corrector: Corrector | None = None
        self._taking: set[asyncio.Task[None]] = set()  # snapshots whose last part has come
        self.address = "HOST:PORT"  # where a sampler on this machine dials in
        self.tick = resume.tick if resume else 0
        self._open = asyncio.Event()
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.server = Server("Anchor", {"Attend": self._attend, "Sample": self._sample}, ledger)
        self._stages: dict[int, Outbox] = {}
        self._samplers: list[Outbox] = []
        self._bases_sent: WeakKeyDictionary[Outbox, int] = WeakKeyDictionary()  # the last version posted to a member
        self._owed: set[str] | None = None  # what the run still owes once it has finished: a checkpoint, an evaluation
        self._evaluated = -1  # the weights that a sampler has last answered an evaluation for
        self._complete: set[str] = {resume.name} if resume else set()
        self._reason = "stopped before it began"
        self._draining = False
        self._failure = ""  # what a stage said of its end, since the start
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
        log.info("stage %d joined from %s", stage, hello.address)
        async with self._outbox(stream) as box:
            self._stages[stage] = box
            self._post(box, FrameKind.WELCOME, self._welcome())
            why = "went away"
            try:
                while (frame := await stream.receive()) is not None:
                    self._from_stage(member, frame)
            except Refused as error:
                why = f"was refused: {error}"
                raise
            except PeerLost:
                pass
            except Exception as error:
                self._fail(error)  # ours, not the stage's: a full disk, a bug
                raise
            finally:
                self.roster.leave(member)
                self._stages.pop(stage, None)
                if self.roster.started and (self._owed is None or self._owed - {EVALUATION}):
                    self._fail(PeerLost(self._failure or f"{stream.peer} {why} at tick {self.tick}"))
                async with self._gone:
                    self._gone.notify_all()

    @contextlib.asynccontextmanager
    async def _outbox(self, stream: FrameStream) -> AsyncIterator[Outbox]:
        """A queue of the member's own: a slow or dead one must not hold up the others."""
        box = Outbox(stream)
        task = asyncio.create_task(box.run())
        task.add_done_callback(lambda t: t.cancelled() or t.exception())  # its reader meets the same end
        try:
            yield box
        finally:
            task.cancel()

    def _from_stage(self, member: Member, frame: Frame) -> None:
        match frame.header.kind:
            case FrameKind.READY:
                ready = from_bytes(Ready, frame.payload)
                complete = self.roster.is_ready(member, ready)
                missing = ", ".join(map(str, self.roster.missing())) or "none"
                size = f"{ready.parameters / 1e6:.2f} M parameters, {ready.parameter_bytes / 1e6:.1f} MB"
                self.event("ready", f"stage {member.stage} ({size}); stages still to come: {missing}")
                if complete:
                    self._start()
            case FrameKind.REPORT:
                report = from_bytes(Report, frame.payload)
                if report.words.get("event") == "failed":
                    # Its neighbours leave with it, and may be the first to be missed.
                    self._failure = self._failure or report.words["message"]
                self._note(report)
            case FrameKind.SKETCH:
                self._take_sketch(from_bytes(Sketch, frame.payload))
            case FrameKind.SNAPSHOT | FrameKind.SLICE if self.corrector is not None:
                self._to_corrector(self.corrector, member.stage, frame)
            case FrameKind.SAVED:
                self._take_saved(member.stage, from_bytes(Saved, frame.payload))
            case FrameKind.STOP:
                self.drain(from_bytes(Stop, frame.payload).reason)
            case kind:
                raise BadFrame(f"stage {member.stage} sent {kind.name}")

    def _start(self) -> None:
        self._failure = ""
        if self.resume is not None:
            self.books.cut(self.resume.tick)
            set_later_aside(self.out, self.resume)
        if self.corrector is not None:
            self.corrector.take_up(self.tick)
        for stage, box in self._stages.items():
            self._post_bases(box, stage)
            self._post(box, FrameKind.START, self._start_message())
            self._post_newest(stage)
        for box in self._samplers:
            self._start_sampler(box)
        self.event("start", f"{self.manifest.stages} stages, at tick {self.tick}")

    def _start_message(self) -> Start:
        start = Start(epoch=self.roster.epoch, stage_addresses=self.roster.addresses())
        if self.resume is not None:
            start.checkpoint = self.resume.name
            start.shard_digests = {stage: saved.digest for stage, saved in self.resume.shards.items()}
        return start

    # Samplers ----------------------------------------------------------------------------------------------------------

    async def _sample(self, stream: FrameStream) -> None:
        hello = from_bytes(Hello, (await stream.expect(FrameKind.HELLO)).payload)
        await self._open.wait()
        self.roster.greet(hello, "sampler")
        stream.name("anchor-sampler", "down", LIMITS)
        stream.peer = "the sampler"
        async with self._outbox(stream) as box:
            self._post(box, FrameKind.WELCOME, self._welcome())
            self._samplers.append(box)  # from now on it is told when the run ends, also while it loads
            if self.roster.started and not self.roster.missing():
                self._start_sampler(box)
            try:
                while (frame := await stream.receive()) is not None:
                    if frame.header.kind is FrameKind.READY:
                        self.event("ready", "a sampler")
                    elif frame.header.kind is FrameKind.REPORT:
                        self._note(from_bytes(Report, frame.payload))
                    elif frame.header.kind is FrameKind.STOP:
                        self.drain(from_bytes(Stop, frame.payload).reason)
                    else:
                        raise BadFrame(f"a sampler sent {frame.header.kind.name}")
            finally:
                self._samplers.remove(box)
                if not self.over.done() and self._owed is None:
                    self.event("sampler", "a sampler went away; ticks go on while there are rollouts")
                    self.ask_for_sampler()
                if not self._samplers:
                    self._settle(EVALUATION)  # nobody is left to make it
                async with self._gone:
                    self._gone.notify_all()

    def ask_for_sampler(self) -> None:
        """Say how to go on while the swarm has no sampler; called again and again, as nothing else will happen."""
        if self.roster.started and not self._samplers and self._owed is None and not self.over.done():
            self.event("waiting", f"for a sampler; start: swarm_worker sample --anchor {self.address}")

    def _start_sampler(self, box: Outbox) -> None:
        self._post_bases(box)
        self._post(box, FrameKind.START, self._start_message())

    # What is reported --------------------------------------------------------------------------------------------------

    def _note(self, report: Report) -> None:
        if report.type == "tick":
            self.tick = max(self.tick, report.tick + 1)
            self.books.ledger(self.ledger.take())
            # The previous tick's: a tick's last ledger rows arrive after its metrics.
            dense, packet = self.books.link_bytes(report.tick - 1)
            if dense:
                report.numbers |= {"bytes/links_previous_tick": packet, "bytes/share_of_dense": packet / dense}
        row = self.books.report(report)
        if row is None:
            return
        self.screen.bytes_update(self.books.totals)
        self.screen.update(row)
        event = report.words.get("event")
        if event == "finished":
            self._reason = report.words["message"]
            self._owed = {report.words["checkpoint"]}  # every stage says so again, once it has applied the end
            # The sampler's answer has a stream of its own, and may have been faster.
            if report.words["evaluation"] == "yes" and self._samplers and self._evaluated < report.tick:
                self._owed.add(EVALUATION)
            self._settle()
        elif report.type == "eval" or event == "no_evaluation":
            self._evaluated = report.tick
            if report.tick >= self.tick:
                self._settle(EVALUATION)

    def _take_sketch(self, sketch: Sketch) -> None:
        if self.keeper is None or self.manifest.config.anchor.q_source != "stage_sketch":
            raise BadFrame("a sketch came, but no basis of these links is made of sketches")
        if self.keeper.add(sketch) is None:
            return
        self.send_bases()
        for (boundary, direction), decision in self.keeper.decisions.items():
            if decision.why:
                self.event("steering", f"boundary {boundary} {direction.name.lower()}: {decision.why}")

    def adopt_bases(self, tick: int, fits: Mapping[Key, Fit]) -> None:
        """Pairs that a replay of that tick has given (anchor.q_source = anchor_replay)."""
        if self.keeper is not None and self.keeper.adopt(tick, fits) is not None:
            self.send_bases()

    def send_bases(self) -> None:
        """The keeper has a new version: to all stages and samplers with it, and into the books."""
        assert self.keeper is not None
        for stage, box in self._stages.items():
            self._post_bases(box, stage)
        for box in self._samplers:
            self._post_bases(box)
        numbers = self.keeper.numbers()
        lowest, version = min(self.keeper.overlap.values()), self.keeper.version
        self.event("basis", f"version {version}, overlap with the last one >= {lowest:.3f}", numbers)

    def _post_bases(self, box: Outbox, stage: int | None = None) -> None:
        """The newest version, or a stage's part of it: as changes to whoever was sent the version before."""
        if self.keeper is None:
            return
        bases, changes = self.keeper.current, self.keeper.changes
        if changes is not None and changes.delta and changes.base == self._bases_sent.get(box):
            bases = changes
        self._bases_sent[box] = bases.version
        self._post(box, FrameKind.BASIS, bases if stage is None else part_for_stage(bases, stage))

    def _to_corrector(self, corrector: Corrector, stage: int, frame: Frame) -> None:
        epoch = self.roster.epoch
        if frame.header.kind is FrameKind.SLICE:
            corrector.take_slice(stage, frame.header, epoch, from_bytes(Slice, frame.payload))
            return

        async def take() -> None:
            held = await corrector.take_snapshot(stage, frame.header, epoch, from_bytes(Snapshot, frame.payload))
            if stage in self._stages:
                self._post(self._stages[stage], FrameKind.SNAPSHOT_HELD, held)

        task = asyncio.create_task(take())  # the parts in the order they came; the last one is decoded on a thread
        self._taking.add(task)
        task.add_done_callback(self._taken)

    def _taken(self, task: asyncio.Task[None]) -> None:
        self._taking.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._fail(error)  # ours: a full disk, a bug

    def replays_ended(self, task: asyncio.Task[None]) -> None:
        """The task that replays has ended; before the end of the run only a bug or a full disk does that."""
        self._taken(task)

    def send_correction(self, stage: int, correction: Correction) -> None:
        """A correction for a stage; one that is away gets the newest when it comes back."""
        if stage in self._stages:
            self._post(self._stages[stage], FrameKind.CORRECTION, correction)

    def _post_newest(self, stage: int) -> None:
        if self.corrector is not None and (correction := self.corrector.newest(stage)) is not None:
            self.send_correction(stage, correction)

    def _take_saved(self, stage: int, saved: Saved) -> None:
        shards = self.roster.saved(stage, saved)
        if shards is None:
            return
        if saved.checkpoint not in self._complete:  # what is complete is never written again
            bases = self.keeper.current if self.keeper is not None else None
            keep = self.manifest.config.checkpoint.keep
            made = complete(self.out, saved.checkpoint, self.digest, shards, keep, bases)
            self._complete.add(saved.checkpoint)
            self.event("checkpoint", f"{made.name}, {sum(s.bytes for s in shards.values()) / 1e6:.1f} MB")
        self._settle(saved.checkpoint)

    def event(self, name: str, message: str, numbers: dict[str, float] | None = None) -> None:
        """An event row, for the books and the screen."""
        log.info("%s: %s", name, message)
        self.screen.update(self.books.row("event", self.tick, {"event": name, "message": message, **(numbers or {})}))

    # The end -----------------------------------------------------------------------------------------------------------

    def drain(self, reason: str) -> None:
        """Ask stage 0 to stop after its tick, with a checkpoint. Before the start there is nothing to save."""
        if self._owed is not None:
            self._settle(EVALUATION)  # the run has finished; only its last evaluation can be left out
        if self._draining:
            return
        self._draining = True
        self.event("stop", reason)
        if not self.roster.started:
            self._reason = reason
            self._end()
        elif 0 in self._stages:
            self._post(self._stages[0], FrameKind.STOP, Stop(reason))

    def _settle(self, paid: str = "") -> None:
        """Once the run has finished and owes nothing more, it is over."""
        if self._owed is not None:
            self._owed.discard(paid)
            if not self._owed:
                self._end()

    def _end(self) -> None:
        if not self.over.done():
            self.over.set_result(self._reason)

    def _fail(self, error: Exception) -> None:
        if not self.over.done():
            self._reason = str(error)
            self.over.set_exception(error)

    async def close(self) -> None:
        """Send everybody home, take their last reports, and close the books."""
        everyone = [*self._stages.values(), *self._samplers]
        for box in everyone:
            self._post(box, FrameKind.STOP, Stop(self._reason, now=True))
        try:
            async with self._gone:
                everybody_left = self._gone.wait_for(lambda: not self._stages and not self._samplers)
                await asyncio.wait_for(everybody_left, timeout=10.0)
        except TimeoutError:
            log.warning("not everybody left within 10 s: %s", [box.stream.peer for box in everyone])
        finally:  # also when this is cancelled: a server that was never stopped keeps its process at the exit
            await self.server.stop()
            self.books.ledger(self.ledger.take())

    def _welcome(self) -> Welcome:
        return Welcome(self.manifest.to_json(), self.digest, self.roster.epoch)

    def _post(self, box: Outbox, kind: FrameKind, message: Any) -> None:
        box.post(Frame(Header(kind, self._run, self.roster.epoch, self.tick), to_bytes(message)))
