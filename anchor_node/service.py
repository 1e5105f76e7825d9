"""The anchor's streams: stage workers and samplers attend, report and are told. Decides nothing a tick would wait for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from anchor_node.absences import GRACE_S, Absences
from anchor_node.books import NO_END, Books, check_report
from anchor_node.checkpoints import Checkpoint, CheckpointError, complete, found, set_later_aside
from anchor_node.epochs import Epochs
from anchor_node.memory import Memory
from anchor_node.off_host import COPIES, OffHost
from anchor_node.probing import Probing
from anchor_node.resuming import Resuming
from anchor_node.roster import Member, Roster
from anchor_node.samplers import EVALUATION, Samplers
from anchor_node.slow_loop import SlowLoop
from anchor_node.standing import Noted, tell
from swarm_core.manifest import Manifest
from swarm_core.run_folder import CHECKPOINTS, checkpoint_name
from swarm_core.wire.beats import Pulse
from swarm_core.wire.errors import BadFrame, PeerLost, Refused, Silent
from swarm_core.wire.frames import Frame, Header, run_id
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import (
    Booked,
    Checked,
    Fence,
    FrameKind,
    Held,
    Hello,
    Ready,
    Report,
    Saved,
    Stop,
    Welcome,
    from_bytes,
    to_bytes,
)
from swarm_core.wire.outbox import Outbox
from swarm_core.wire.streams import FrameStream, Server

log = logging.getLogger(__name__)
REPORT_LIMIT = 16 << 20  # 20,000 rows of the ledger are 2 MB


class Screen(Protocol):
    """Where people look on: the live table, or plain lines."""

    def update(self, row: dict[str, Any]) -> None: ...

    def bytes_update(self, totals: dict[str, list[int]]) -> None: ...


AWAY = "went away"
LEAVE_S = 10.0  # for everybody to leave, once they have been told to


class AnchorService:
    """One run, from the first HELLO to STOP. `over` resolves with the reason of the end, or fails with what broke.

    `books` are opened once the server has bound, the keeper of `slow` comes with the first bases, both before `open`.
    """

    books: Books

    def __init__(
        self,
        manifest: Manifest,
        screen: Screen,
        out: Path,
        resume: Sequence[Checkpoint],
        ledger: Ledger,
        memory: Memory | None = None,
    ) -> None:
        """`resume`: the checkpoints that the run may go on from, newest first; none: it begins from the model. `memory`: the run that an anchor before this one has left at work. Its members may come back, or all anew."""
        self.manifest = manifest
        self.digest = manifest.digest()
        known = {int(member) for member in memory.booked} if memory is not None else None
        self.memory = memory or Memory()
        self.roster = Roster(manifest.stages, self.digest, manifest.model_fingerprint, known)
        self.roster.epoch = self.memory.epoch
        self.epochs = Epochs(self)
        self.screen, self.out, self.ledger = Noted(screen), out, ledger
        self.resuming = Resuming(self, resume)
        self.describe: Callable[[Path], None] = lambda checkpoint: None  # as a model for transformers
        self.address = "HOST:PORT"  # where a sampler on this machine dials in
        self.tick = max(self.resume.tick if self.resume else 0, self.memory.tick)
        self._open = asyncio.Event()
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        calls = {
            "Attend": self._attend,
            "Sample": self._sample,
            "Status": partial(tell, self),
            "Probe": Probing(self).serve,
        }
        self.server = Server("Anchor", calls, ledger)
        self.stages: dict[int, Outbox] = {}
        self.slow = SlowLoop(self)
        self.off_host = OffHost(self)
        self._pulse = Pulse("serving", lambda: (self.roster.epoch, self.tick))
        self._newest = 0  # tick of the newest report of any stage: it moves while the run does
        self.absent = Absences(lambda: self._newest)
        self.samplers = Samplers(self)
        self.ledgered: dict[int, int] = {}  # stage -> the tick up to which its ledger rows have come
        self.owed: set[str] | None = None  # what the run still owes once it has finished: a checkpoint, an evaluation
        self.complete = {checkpoint.name for checkpoint in found(out)} if memory is not None else set()
        self._reason = "stopped before it began"
        self._draining = False
        self._failure = ""  # what a stage said of its end, where that was its own fault
        self._gone = asyncio.Condition()

    @property
    def _run(self) -> int:
        return run_id(self.digest)

    @property
    def resume(self) -> Checkpoint | None:
        """Where the run goes on when its members come anew, as far as is known."""
        return self.resuming.checkpoint

    @property
    def opened(self) -> bool:
        """Whether those who dial are answered."""
        return self._open.is_set()

    def open(self) -> None:
        """Answer those who have dialled; until now they wait (version 0 of the bases was being made)."""
        self._open.set()

    # Stage workers -----------------------------------------------------------------------------------------------------

    async def _attend(self, stream: FrameStream) -> None:
        hello = from_bytes(Hello, (await stream.expect(FrameKind.HELLO)).payload)
        stream.must_be_stage(hello.stage)
        await self._open.wait()
        lost = self.roster.members.get(hello.stage)
        member = self.roster.join(hello)
        stage = member.stage
        stream.name(f"anchor-stage{stage}", "down", {FrameKind.REPORT: REPORT_LIMIT} | self.slow.limits())
        stream.peer = f"stage {stage} at {hello.address}"
        log.info("stage %d %s from %s", stage, "is back" if hello.at_work else "joined", hello.address)
        async with self.outbox(stream) as box:
            self.stages[stage] = box
            self.post(box, FrameKind.WELCOME, self.welcome(hello))
            if lost is not None:  # it is back, or this one takes its place
                self.absent.back(lost.number)
            if hello.at_work:
                self.back(hello, box)
            if hello.at_work and self.roster.started:
                self.epochs.rejoined(member, box)
            why = AWAY
            try:
                while (frame := await stream.receive()) is not None:
                    self._from_stage(member, box, frame)
            except Refused as error:
                why = f"was refused: {error}"
                raise
            except PeerLost as error:
                if isinstance(error, Silent):
                    self.event("silent", str(error))
                    raise
            except Exception as error:
                self.fail(error)  # ours, not the stage's: a full disk, a bug
                raise
            finally:
                if self.stages.get(stage) is box:  # and no newer stream of the same stage
                    del self.stages[stage]
                    self._left(member, why)
                async with self._gone:
                    self._gone.notify_all()

    async def _sample(self, stream: FrameStream) -> None:
        hello = from_bytes(Hello, (await stream.expect(FrameKind.HELLO)).payload)
        await self._open.wait()
        try:
            await self.samplers.attend(stream, hello)
        finally:
            async with self._gone:
                self._gone.notify_all()

    def _left(self, member: Member, why: str) -> None:
        """A stage's stream has ended. At work it may have broken only, unless somebody has said that he fails."""
        if self.over.done() or not self.roster.started or not (self.owed is None or self.owed - {EVALUATION}):
            self.roster.leave(member)
            self.resuming.gone(member.stage)
            return
        member.away = True
        self.epochs.rounds.gone(member.stage)
        if self._failure or why != AWAY and member.at_work:  # who only wanted to take a place may be refused
            self.fail(PeerLost(self._failure or f"stage {member.stage} at {member.address} {why} at tick {self.tick}"))
        else:
            log.warning("the stream to stage %d broke at tick %d", member.stage, self.tick)
            self.absent.add(member.number, self.ask_for_stages, patient=True)

    def ask_for_stages(self) -> None:
        """Say how to go on without a stage that is gone; called again and again, as nothing else will happen."""
        for member in self.roster.members.values():
            if member.away and not self.over.done():
                how = f"start: swarm_worker join --stage {member.stage} --anchor {self.address}, with the --out of the lost one"
                self.event("waiting", f"for stage {member.stage}, which went away at tick {self.tick}; {how}")

    def back(self, hello: Hello, box: Outbox) -> None:
        """A member at work is there again: on a new stream to this anchor, or for the first time after another one."""
        self.tick, self._newest = max(self.tick, hello.tick), max(self._newest, hello.tick)
        stage = hello.stage if hello.role == "stage" else None
        if stage is not None and self.memory.closing:
            self._end(self.memory.closing)
        elif stage is not None and self.roster.taken_over():
            self._carry_on()
        if hello.role == "sampler":
            self.absent.back(hello.member)
        self.slow.post_bases_beyond(hello.basis_version, box, stage)
        if stage is not None:
            self.slow.post_corrections(stage)
        if self.over.done():
            self.tell_end(box)
        elif stage == 0:
            self.drain_again()

    def tell_end(self, box: Outbox) -> None:
        """Send home who comes when the run is over."""
        self.post(box, FrameKind.STOP, Stop(self._reason, now=True))

    def drain_again(self) -> None:
        """Stage 0 may be on a new stream, or another process than the one that was asked to end the run."""
        if self._draining and 0 in self.stages:
            self.post(self.stages[0], FrameKind.STOP, Stop("the anchor was asked to end the run"))

    def _carry_on(self) -> None:
        """All stages of a run that another anchor started are there: nobody needs another epoch, or one begins."""
        self.event("carries_on", f"{self.manifest.stages} stages at work, at tick {self.tick}")
        self.samplers.carry_on()
        self.epochs.carry_on()
        if self.memory.finished and self.owed is None:
            self._finish(self.memory.finished)

    @contextlib.asynccontextmanager
    async def outbox(self, stream: FrameStream) -> AsyncIterator[Outbox]:
        """A queue of the member's own: a slow or dead one must not hold up the others."""
        box = Outbox(stream)
        task = asyncio.create_task(box.run())
        task.add_done_callback(lambda t: t.cancelled() or t.exception())  # its reader meets the same end
        stream.heart.start(self._pulse, until=self.over)
        try:
            yield box
        finally:
            task.cancel()

    def _from_stage(self, member: Member, box: Outbox, frame: Frame) -> None:
        match frame.header.kind:
            case FrameKind.READY:
                ready = from_bytes(Ready, frame.payload)
                complete = self.roster.is_ready(member, ready)
                missing = ", ".join(map(str, self.roster.missing())) or "none"
                size = f"{ready.parameters / 1e6:.2f} M parameters, {ready.parameter_bytes / 1e6:.1f} MB"
                self.event("ready", f"stage {member.stage} ({size}); stages still to come: {missing}")
                if self.roster.started:
                    self.epochs.rejoined(member, box)
                elif complete and self.roster.taken_over():
                    self._carry_on()
                elif complete and self.roster.known is not None:
                    self.epochs.all_anew()
                elif complete:
                    self.begin()
            case FrameKind.CHECKED:
                self.resuming.take(member.stage, from_bytes(Checked, frame.payload))
            case FrameKind.FENCE:
                fence = from_bytes(Fence, frame.payload)
                self.epochs.asked(fence)
            case FrameKind.HELD:
                self.epochs.take(member.stage, from_bytes(Held, frame.payload))
            case FrameKind.REPORT:
                report = self.read_report(frame)
                self._newest = max(self._newest, report.tick)
                if report.words.get("event") == "failed":
                    self._failure = self._failure or report.words["message"]
                if report.type == "ledger":
                    self.ledgered[member.stage] = report.tick
                self.book(member.number, box, report)
            case FrameKind.SKETCH | FrameKind.SNAPSHOT | FrameKind.SLICE:
                self.slow.take(member.stage, frame)
            case FrameKind.COPY | FrameKind.COPIES | FrameKind.COPY_WANTED:
                self.off_host.take(member, box, frame)
            case FrameKind.SAVED:
                self._take_saved(member.stage, from_bytes(Saved, frame.payload))
            case FrameKind.STOP:
                self.drain(from_bytes(Stop, frame.payload).reason)
            case kind:
                raise BadFrame(f"stage {member.stage} sent {kind.name}")

    def begin(self) -> None:
        """A run begins, from the model's files or from a checkpoint."""
        if self.roster.known is not None and self.resume is None:
            self.fail(
                CheckpointError(
                    "all stages come anew, and there is neither a version that all hold nor a complete checkpoint"
                )
            )
            return
        if not self.resuming.settled():
            return  # the stages are asked what they hold, and this is called again
        self._failure = ""
        self.epochs.begin()
        self.tick, self.complete = 0, set()
        if self.resume is not None:
            self.tick, self.complete = self.resume.tick, {self.resume.name}
            self.books.cut(self.resume.tick)
            self.forget_later(self.resume.tick)
            self.resuming.tell()
        self.slow.begin()
        self.memory.begin(self.digest, self.roster.epoch, self.epochs.rounds.start_id, self.tick, self.books.started)
        for member in self.roster.members.values():
            self.memory.enter(member.number, f"stage {member.stage}")
        for stage, box in self.stages.items():
            self.slow.post_bases(box, stage)
            self.post(box, FrameKind.START, self.epochs.start_message())
            self.slow.post_corrections(stage)
        self.samplers.start()
        self.event("start", f"{self.manifest.stages} stages, at tick {self.tick}")

    # What is reported --------------------------------------------------------------------------------------------------

    def read_report(self, frame: Frame) -> Report:
        """A report that the books can hold. Raises BadFrame."""
        report = from_bytes(Report, frame.payload)
        check_report(report, self.manifest.config.run.ticks)
        return report

    def check_tick(self, tick: int, what: str) -> None:
        """Raises BadFrame for a tick that this run will never come to."""
        ticks = self.manifest.config.run.ticks or NO_END
        if tick >= ticks:
            raise BadFrame(f"{what} is of tick {tick}; the run ends with tick {ticks - 1}")

    def book(self, member: int, box: Outbox, report: Report) -> None:
        """Take a report into the books, once, and say so: its sender keeps it until then."""
        if not report.number or report.number > self.memory.booked.get(str(member), 0):
            self._note(member, report)
            self.books.mark()
        if report.number:
            self.post(box, FrameKind.BOOKED, Booked(report.number))

    def _note(self, member: int, report: Report) -> None:
        self.books.ledger(self.ledger.take())
        if report.type == "tick":
            self.tick = max(self.tick, report.tick + 1)
            self.memory.tick = self.tick
            # The previous tick's: a tick's last ledger rows arrive after its metrics, after an outage long after.
            dense, packet = self.books.link_bytes(report.tick - 1)
            if dense and all(self.ledgered.get(i, -1) >= report.tick - 1 for i in range(self.manifest.stages)):
                report.numbers |= {"bytes/links_previous_tick": packet, "bytes/share_of_dense": packet / dense}
            report.numbers |= self.off_host.numbers()
        row = self.books.report(report)
        if report.number:
            self.memory.booked[str(member)] = report.number  # before anything that marks the books
        if row is None:
            return
        self.screen.bytes_update(self.books.totals)
        self.screen.update(row)
        event = report.words.get("event")
        if event == "finished":
            self.memory.finished = {**report.words, "tick": str(report.tick)}
            self._finish(self.memory.finished)
        elif report.type == "eval" or event == "no_evaluation":
            self.memory.evaluated = report.tick
            if report.tick >= self.tick:
                self.settle(EVALUATION)

    def _finish(self, words: dict[str, str]) -> None:
        self._reason = words["message"]
        self.owed = {
            words["checkpoint"]
        } - self.complete  # where a run ends without another tick, it may be there already
        # The sampler's answer has a stream of its own, and may have been faster.
        if words["evaluation"] == "yes" and self.samplers.expected and self.memory.evaluated < int(words["tick"]):
            self.owed.add(EVALUATION)
        if self.off_host.finished(words["checkpoint"]):
            self.owed.add(COPIES)
        self.settle()

    def _take_saved(self, stage: int, saved: Saved) -> None:
        shards = self.roster.saved(stage, saved)
        if shards is None:
            return
        if saved.checkpoint not in self.complete:  # what is complete is never written again
            bases = self.slow.keeper.current if self.slow.keeper is not None else None
            keep = self.manifest.config.checkpoint.keep
            self.describe(self.out / CHECKPOINTS / saved.checkpoint)
            made = complete(self.out, saved.checkpoint, self.digest, shards, keep, bases)
            self.off_host.completed()
            self.complete.add(saved.checkpoint)
            self.event("checkpoint", f"{made.name}, {sum(s.bytes for s in shards.values()) / 1e6:.1f} MB")
        self.settle(saved.checkpoint)

    def forget_later(self, tick: int) -> None:
        """The run goes on from this tick, and will come by later ones once more: their checkpoints are of a lost future."""
        set_later_aside(self.out, tick)
        self.roster.forget_saved(tick)
        self.complete = {name for name in self.complete if name <= checkpoint_name(tick)}

    def event(self, name: str, message: str, numbers: dict[str, float] | None = None) -> None:
        """An event row, for the books and the screen."""
        log.info("%s: %s", name, message)
        self.screen.update(self.books.row("event", self.tick, {"event": name, "message": message, **(numbers or {})}))
        self.books.mark()

    # The end -----------------------------------------------------------------------------------------------------------

    def drain(self, reason: str) -> None:
        """Ask stage 0 to stop after its tick, with a checkpoint. Before the start there is nothing to save."""
        if self.owed is not None:
            self.settle(EVALUATION)  # the run has finished; only these two can be left out
            self.settle(COPIES)
        if self._draining:
            return
        self._draining = True
        self.event("stop", reason)
        if not self.roster.at_work:
            self._end(reason)
        elif 0 in self.stages:
            self.post(self.stages[0], FrameKind.STOP, Stop(reason))

    def settle(self, paid: str = "") -> None:
        """Once the run has finished and owes nothing more, it is over."""
        if self.owed is not None:
            self.owed.discard(paid)
            if not self.owed:
                self._end(self._reason)

    def _end(self, reason: str) -> None:
        if not self.over.done():
            self._reason = self.memory.closing = reason
            self.books.mark()
            self.over.set_result(reason)

    def fail(self, error: Exception) -> None:
        if not self.over.done():
            self._reason = str(error)
            self.over.set_exception(error)

    async def close(self) -> None:
        """Send everybody home, take their last reports, and close the books."""
        everyone = [*self.stages.values(), *self.samplers.boxes.values()]
        for box in everyone:
            self.tell_end(box)
        if not self.over.done() or self.over.cancelled() or self.over.exception() is not None:
            self.absent.clear()  # only a run that ends in order waits for whoever is away
        try:
            async with self._gone:
                everybody_left = self._gone.wait_for(lambda: not (self.stages or self.samplers.boxes or self.absent))
                await asyncio.wait_for(everybody_left, timeout=GRACE_S if self.absent else LEAVE_S)
        except TimeoutError:
            log.warning("not everybody left in time: %s", [box.stream.peer for box in everyone])
        finally:  # also when this is cancelled: a server that was never stopped keeps its process at the exit
            self.absent.clear()
            await self.server.stop()
            self.books.ledger(self.ledger.take())
            self.memory.at_work = False
            self.books.mark()

    def welcome(self, hello: Hello) -> Welcome:
        booked = self.memory.booked.get(str(hello.member), 0)
        return Welcome(self.manifest.to_json(), self.digest, self.roster.epoch, booked)

    def post(self, box: Outbox, kind: FrameKind, message: Any) -> None:
        box.post(Frame(Header(kind, self._run, self.roster.epoch, self.tick), to_bytes(message)))
