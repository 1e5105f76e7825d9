"""The process of one stage worker: join, then epoch after epoch meet the neighbours and work, then leave. The shell's shell.

A neighbour that is lost ends the epoch, not the process: it tells the anchor, answers the FENCE with what it can go back to,
and works on from where the next START says. What that means for its tensors is in epochs.py.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from swarm_core.errors import UserError
from swarm_core.wire.beats import Pulse
from swarm_core.wire.errors import AnchorAway, BadFrame, PeerLost, Refused, StaleEpoch, Unreachable
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.health import Health
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import (
    Copy,
    CopyHeld,
    Fence,
    FrameKind,
    Hello,
    Rollouts,
    Saved,
    Start,
    Stop,
    Welcome,
    from_bytes,
    to_bytes,
)
from swarm_core.wire.pacing import read_limits
from swarm_core.wire.streams import Dialled, FrameStream, dial, dialable
from swarm_worker.alone import alone
from swarm_worker.anchor_link import AnchorLink, Standing
from swarm_worker.copying import Copier, keeps_copy
from swarm_worker.entry import Entry, enter
from swarm_worker.epochs import Epochs, span_of
from swarm_worker.membership import Membership, await_word, join, tell_failure
from swarm_worker.restoring import Restoring
from swarm_worker.service import StageService
from swarm_worker.turns import Turns
from swarm_worker.vitals import watch_member, watch_stage
from swarm_worker.worker import StageWorker

log = logging.getLogger(__name__)
LEAVE_S = 120.0  # for a checkpoint that is being written when a process has to leave
NEIGHBOUR_WAIT_S = 60.0  # neighbours were told to start together; a minute covers a slow link's handshake


@dataclass(frozen=True)
class StageArguments:
    """The command line of `swarm_worker join`."""

    stage: int
    anchor: str
    listen: str = "127.0.0.1:0"
    advertise: str | None = None
    out: Path = Path("runs/worker")
    model: str | None = None
    expect_digest: str = ""
    wait_s: float = 60.0
    limit_mbps: str | None = None
    entry: Entry = field(default_factory=Entry)
    health_port: int | None = None


async def hold_stage(arguments: StageArguments, *, signals: bool = True) -> None:
    """`swarm_worker join`. Built inside the running loop, which gRPC's asyncio server binds to.

    `signals` False leaves SIGINT and SIGTERM alone, for several workers in one process.
    """
    if arguments.stage < 0:
        raise UserError(f"stage {arguments.stage} does not exist: stages are counted from 0")
    with alone(arguments.out, arguments.stage):
        await StageProcess(arguments, signals).run()


class StageProcess:
    """Everything from the command line to the exit of one stage worker."""

    def __init__(self, arguments: StageArguments, signals: bool) -> None:
        self.arguments = arguments
        self._signals = signals
        self.ledger = Ledger()
        self.worker: StageWorker | None = None
        self.epochs: Epochs
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self.service = StageService(arguments.stage, self.ledger, self._serve_above, self._take_rollouts)
        self.limits = self.service.server.limits = read_limits(arguments.limit_mbps)
        self.health = Health()
        self._words: asyncio.Queue[Fence | Start | Stop | BaseException] = asyncio.Queue()
        self._leave_s = LEAVE_S
        self._stalled = ""  # why this stage cannot go on in its epoch
        self._turns = Turns()
        self._copier: Copier | None = None
        self._stop: Stop | None = None  # asked for after a tick; every stage 0 that leads on is told

    async def run(self) -> None:
        """Join, work until the run ends, leave. Raises typed errors with one readable line."""
        a = self.arguments
        membership, link = None, None
        tasks: list[asyncio.Task[None]] = []
        try:
            identity = await enter(a.entry, a.anchor, a.listen, a.out, "stage", a.stage, a.wait_s)
            self.service.server.identity, self.service.server.trusted_network = identity, a.entry.trusted_network
            address = await self.service.server.start(a.listen)
            await self.health.start(a.health_port, a.listen)
            hello = Hello(role="stage", stage=a.stage, address=a.advertise or dialable(address))
            hello.manifest_digest = a.expect_digest
            membership = await join(
                a.anchor, "Anchor/Attend", hello, self.ledger, a.wait_s, f"anchor-stage{a.stage}", identity
            )
            membership.anchor.pace(self.limits)
            watch_member(self.health, membership.way.pulse)
            self.epochs = Epochs(membership, a.stage, a.out, a.model, self._thread)
            held = await self.epochs.find()
            if await Restoring(membership, a.out, a.stage).run(held):
                await self.epochs.find()
            ready = Frame(Header(FrameKind.READY, membership.run), to_bytes(await self.epochs.load()))
            start = await await_word(membership, ready, a.wait_s, answer=self._answer, check=self.epochs.check)
            if start is None:
                return
            self._turns.start(start.epoch, start.recovery)
            link = AnchorLink(membership, self._standing, membership.manifest.config.checkpoint.keep)
            link.on_return.append(partial(self._anchor_is_back, link))
            self.epochs.saving.said = partial(self._post_saved, membership, link)
            self.epochs.saving.failed = self._words.put_nowait
            if self._signals:
                self._on_signals(link)
            if keeps_copy(membership.manifest.config.checkpoint.off_host, a.out):
                tasks.append(asyncio.create_task(self._copy(membership, link)))
            tasks += [asyncio.create_task(link.run()), asyncio.create_task(self._read_anchor(membership, link))]
            for task in tasks:
                task.add_done_callback(self._task_done)
            log.info("the run is over: %s", await self._work(membership, link, start))
        except Exception as error:
            if link is not None:
                await link.last_words(f"stage {a.stage}", error)
            elif membership is not None:
                await tell_failure(membership, f"stage {a.stage}", error)
            raise
        except (KeyboardInterrupt, asyncio.CancelledError):
            self._leave_s = 0.0
            raise
        finally:
            for task in tasks:
                task.cancel()
            if membership is not None and hasattr(self, "epochs"):
                await self.epochs.saving.close(self._leave_s)
            if membership is not None:
                await membership.anchor.close()
            await self.service.server.stop()
            await self.health.stop()
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _copy(self, membership: Membership, link: AnchorLink) -> None:
        """Keep a copy of this stage's files with the anchor, for as long as the process lives."""

        def post(copy: Copy) -> None:
            link.post(Frame(Header(FrameKind.COPY, membership.run, tick=self.epochs.standing()[0]), to_bytes(copy)))

        a = self.arguments
        self._copier = Copier(post, self.epochs.redo, a.out, a.stage, membership.manifest.stages)
        link.on_return.append(self._copier.resume)
        await self._copier.run()

    # Epochs ------------------------------------------------------------------------------------------------------------

    async def _work(self, membership: Membership, link: AnchorLink, start: Start) -> str:
        """One epoch after the other, until the run is over; returns the reason of its end."""
        epoch: asyncio.Task[str] | None = asyncio.create_task(self._work_epoch(membership, link, start))
        word = asyncio.create_task(self._words.get())
        try:
            while True:
                await asyncio.wait({word, epoch} if epoch else {word}, return_when=asyncio.FIRST_COMPLETED)
                if epoch is not None and epoch.done():
                    try:
                        return epoch.result()
                    except AnchorAway:
                        raise
                    except (PeerLost, StaleEpoch, Unreachable) as error:
                        self._cannot_go_on(link, error)
                    epoch = None
                if not word.done():
                    continue
                said, word = word.result(), asyncio.create_task(self._words.get())
                if isinstance(said, BaseException):
                    raise said
                match said:
                    case Fence() if self._turns.fence(said.epoch):
                        await _cancelled(epoch)
                        epoch = None
                        link.post(await self._answer(said))
                    case Start() if self._turns.start(said.epoch, said.recovery):
                        await _cancelled(epoch)
                        epoch = asyncio.create_task(self._work_epoch(membership, link, said))
                    case Stop() if self.worker is None:
                        return said.reason
        finally:
            word.cancel()
            await _cancelled(epoch)

    async def _work_epoch(self, membership: Membership, link: AnchorLink, start: Start) -> str:
        below, pulse, self._stalled = None, membership.way.pulse, ""
        try:
            work, zero = await self.epochs.set_up(start)
            self.service.offer(work.position.tick, work.compute.published.get(work.position.tick, {}))
            below = await self._dial_below(membership, start)
            self.worker = worker = StageWorker(membership, link, work, self.service, below, zero)
            if zero is not None and self._stop is not None:
                zero.lead.stop_requested = True
            watch_stage(self.health, worker)
            for report in self.epochs.take_rows():
                link.post_report(report)
            if start.recovery:
                link.forget_saved(start.tick)
            for saved in self.epochs.saved:
                self._post_saved(membership, link, saved)
            if below is not None:
                below.heart.start(worker.pulse, until=worker.over)
            self.service.open(membership.digest, start.epoch)
            return await worker.run()
        finally:
            self.worker, pulse.phase, pulse.awaits = None, "between two epochs", Pulse().awaits
            if below is not None:
                await below.close()
            await self.service.shut()

    async def _answer(self, fence: Fence) -> Frame:
        """What this stage can go back to. What was being computed or written is finished when this returns."""
        self._turns.fence(fence.epoch)
        await self.epochs.saving.idle()  # said of it before this answer, and nothing is said of a future that is left
        held = await asyncio.get_running_loop().run_in_executor(self._thread, self.epochs.held, fence.epoch)
        log.warning("epoch %d: %s; this stage holds %s", fence.epoch, fence.reason, span_of(held))
        return Frame(Header(FrameKind.HELD, epoch=fence.epoch), to_bytes(held))

    def _post_saved(self, membership: Membership, link: AnchorLink, saved: Saved) -> None:
        link.post(Frame(Header(FrameKind.SAVED, membership.run, tick=saved.tick), to_bytes(saved)))

    def _cannot_go_on(self, link: AnchorLink, error: Exception | None = None) -> None:
        """A neighbour is lost: the anchor is to end this epoch. Said again to an anchor that is back."""
        if error is not None:
            self._stalled = f"stage {self.arguments.stage}: {error}"
            log.warning("epoch %d cannot go on: %s", self._turns.epoch, error)
        fence = Fence(self._turns.epoch, self._stalled)
        link.post(Frame(Header(FrameKind.FENCE, epoch=fence.epoch), to_bytes(fence)))

    # The anchor --------------------------------------------------------------------------------------------------------

    async def _read_anchor(self, membership: Membership, link: AnchorLink) -> None:
        """Bases, epochs and the end of the run come from the anchor; no tick waits for any of them."""
        while (frame := await link.receive()) is not None:
            match frame.header.kind:
                case FrameKind.BASIS:
                    message = membership.take_bases(frame)
                    if self.worker is not None:
                        await self.worker.take_bases(message)
                case FrameKind.SNAPSHOT_HELD | FrameKind.CORRECTION:
                    if self.worker is not None:
                        await self.worker.slow.take(frame)
                case FrameKind.COPY_HELD:
                    if self._copier is not None:
                        self._copier.held(from_bytes(CopyHeld, frame.payload))
                case FrameKind.FENCE:
                    self._words.put_nowait(from_bytes(Fence, frame.payload))
                case FrameKind.START:
                    self._words.put_nowait(from_bytes(Start, frame.payload))
                case FrameKind.STOP:
                    self._stop = stop = from_bytes(Stop, frame.payload)
                    if self.worker is not None:
                        self.worker.stop(stop)
                    if stop.now:
                        self._words.put_nowait(stop)
                        return
                case kind:
                    raise BadFrame(f"the anchor sent {kind.name}")

    def _task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._words.put_nowait(error)

    def _standing(self) -> Standing:
        tick, basis = self.epochs.standing()
        return Standing(self._turns.epoch, tick, basis, stalled=self.worker is None)

    def _anchor_is_back(self, link: AnchorLink) -> None:
        """Its stream is a new one: what was said on the last one may be lost."""
        if self.worker is not None:
            self.worker.slow.resume()
        elif self._stalled:
            self._cannot_go_on(link)

    async def _dial_below(self, membership: Membership, start: Start) -> Dialled | None:
        """The link to the next stage. It answers once its own link is up, so the chain closes from the last stage on."""
        stage = self.arguments.stage
        if stage + 1 == membership.manifest.stages:
            return None
        address = start.stage_addresses[stage + 1]
        below = await dial(
            address, "Stage/Link", self.ledger, f"stage {stage + 1}", NEIGHBOUR_WAIT_S,
            identity=self.service.server.identity, stage=stage + 1,
        )  # fmt: skip
        below.name(f"stage{stage}-stage{stage + 1}", "down").pace(self.limits)
        hello = Hello(role="link", stage=stage, manifest_digest=membership.digest, epoch=start.epoch)
        try:
            await below.send(Frame(Header(FrameKind.HELLO, membership.run), to_bytes(hello)))
            from_bytes(Welcome, (await below.expect(FrameKind.WELCOME)).payload)
        except BaseException:
            await below.close()  # a neighbour that is not there yet would take it up in the next epoch
            raise
        return below

    # Streams that others dial ------------------------------------------------------------------------------------------

    async def _serve_above(self, stream: FrameStream) -> None:
        assert self.worker is not None, "the service opens after the worker stands"
        stream.heart.start(self.worker.pulse, until=self.worker.over)
        await self.worker.serve_above(stream)

    def _take_rollouts(self, message: Rollouts) -> None:
        assert self.worker is not None, "the service opens after the worker stands"
        try:
            self.worker.take_rollouts(message)
        except Refused:
            raise  # the sampler's fault, and it is told
        except Exception as error:
            self.worker.fail(error)
            raise

    def _on_signals(self, link: AnchorLink) -> None:
        """SIGTERM or SIGINT: ask for the end of the run after this tick; a second one ends this process at once."""
        asked = False

        def leave(name: str) -> None:
            nonlocal asked
            if asked:
                self._words.put_nowait(KeyboardInterrupt(name))
                return
            asked = True
            log.warning("%s: leaving after this tick, with a checkpoint; once more to leave at once", name)
            self._stop = stop = Stop(reason=f"stage {self.arguments.stage} got {name}")
            link.post(Frame(Header(FrameKind.STOP), to_bytes(stop)))
            if self.worker is not None:
                self.worker.stop(stop)  # stage 0 needs no anchor for it

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, leave, number.name)


async def _cancelled(task: asyncio.Task[str] | None) -> None:
    """Cut off an epoch, if there is one, and wait until it has left nothing behind."""
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
