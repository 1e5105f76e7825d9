"""A stage worker: turns frames and finished work into events of the schedule, and carries its commands out.

One asyncio thread moves frames and decides; one compute thread moves tensors. Neither waits for the other: what is to
be sent is posted to an outbox, what is to be computed is handed to the compute thread, and both come back as events.
It lives for one epoch. Joining, starting and starting again are in stage_process.py; what stage 0 decides is in stage_zero.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from dataclasses import replace
from functools import partial
from typing import Any

from codec.spec import Direction
from swarm_core.learning.errors import LearningError
from swarm_core.wire.bases import matrix_of
from swarm_core.wire.errors import AnchorAway, BadFrame, PeerLost
from swarm_core.wire.frames import Frame, Header, address_of
from swarm_core.wire.messages import (
    BasisSet,
    BatchData,
    Begin,
    Decide,
    FrameKind,
    Outcome,
    Report,
    Rollouts,
    Sketch,
    Stop,
    Vote,
    from_bytes,
    to_bytes,
)
from swarm_core.wire.outbox import Outbox
from swarm_core.wire.rollouts import batch_data, read_batch, read_rollouts
from swarm_core.wire.streams import FrameStream
from swarm_worker import failpoints
from swarm_worker.admission import Admission
from swarm_worker.anchor_link import AnchorLink
from swarm_worker.compute import Packet
from swarm_worker.compute_thread import Applied, ComputeThread
from swarm_worker.headers import Position, header_of, key
from swarm_worker.membership import Membership, read_bases
from swarm_worker.redo import Kind, Record
from swarm_worker.schedule import (
    ActivationCame,
    AskAgain,
    Begun,
    CastVote,
    Compute,
    Computed,
    Decided,
    Event,
    Finished,
    GradientCame,
    Lost,
    Op,
    ResendAsked,
    Schedule,
    Sent,
    Stamp,
    VoteCame,
)
from swarm_worker.service import StageService
from swarm_worker.slow_circuit import SlowCircuit
from swarm_worker.stage_zero import StageZero
from swarm_worker.voting import ANCHOR_WAIT, Ballot

log = logging.getLogger(__name__)
LEAVE_S = 60.0  # for the last report, once the anchor has said that the run is over; a restart takes seconds
WATCH_S = 30.0  # a tick of a large model over a slow link can take this long; nothing is decided by it


class StageWorker:
    """One stage at work in one epoch, from START on. `over` resolves when the run has ended, or fails with what broke."""

    def __init__(
        self,
        membership: Membership,
        anchor: AnchorLink,
        work: ComputeThread,
        service: StageService,
        below: FrameStream | None,
        zero: StageZero | None,
    ) -> None:
        self.anchor = anchor
        self.manifest, self.run_id = membership.manifest, membership.run
        self.pulse = membership.way.pulse
        self.pulse.phase, self.pulse.stands, self.pulse.awaits = "at work", self._stands, self.awaits
        self.work = work
        self.span = work.compute.span
        self.service = service
        self.zero = zero
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.schedule = Schedule(self.span.stage, self.span.stages)
        compute = work.compute
        links = self.manifest.config.links
        self.admission = Admission(
            self.span.stage, self.run_id, self.manifest.link(), links, work.position, compute.batches
        )
        self.above: Outbox | None = None
        self.below = Outbox(below) if below is not None else None
        # Activations received but not yet computed on; beyond it the reader stops, and with it the sender's window.
        self._room = asyncio.Semaphore(4 * self.span.stages)
        self._ballot = Ballot(self.span.stage)
        self._round_active = False
        self._finished = False  # the last decision has been applied
        self.slow = SlowCircuit(self.anchor, work, self.run_id, self.manifest.vocab)
        # The newest version that every stage has voted to hold; before the first vote the one that was in use: a newer one
        # may be on its way to some, and whoever begins again holds the newest beside what its log says.
        self._basis_held = zero.lead.state.basis_version if zero is not None else 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.progress_at = time.monotonic()

    @property
    def position(self) -> Position:
        """Where this stage stands."""
        return self.work.position

    # Life --------------------------------------------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task whose failure ends the worker."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.fail(task.exception())  # type: ignore[arg-type]

    def fail(self, error: BaseException) -> None:
        """End the worker with an error, once."""
        if not self.over.done():
            self.over.set_exception(error)

    async def run(self) -> str:
        """Work until STOP; returns its reason. Raises what broke: PeerLost or StaleEpoch where a neighbour is to blame."""
        self.spawn(self.watch())
        self.spawn(self.slow.run())
        if self.below is not None:
            self.below.stream.bound(partial(self.admission.largest, Direction.BACKWARD))
            self.spawn(self.below.run())
            self.spawn(self._read_below(self.below.stream))
        self._advance()
        try:
            reason = await self.over
            await self.work.saving.idle()  # also where nobody waits for this checkpoint
            self.anchor.post_report(Report(type="ledger", tick=self.position.tick))
            if not await self.anchor.leave(LEAVE_S):
                log.warning("stage %d leaves before the anchor has booked its last report", self.span.stage)
            return reason
        finally:
            self.over.cancel()  # from now on nobody asks what breaks
            for task in self._tasks:
                task.cancel()

    def _stands(self) -> tuple[int, int]:
        return self.position.epoch, self.position.tick

    def awaits(self) -> tuple[str, float]:
        """What is awaited, in words, and for how many seconds nothing has moved. Every beat says it."""
        what = self.work.saving.awaited or self.schedule.waiting_for()
        what = what or (self.zero.lead.waiting_for() if self.zero is not None else "")
        return what, time.monotonic() - self.progress_at

    async def watch(self) -> None:
        """Say what is awaited when nothing has moved for a while: a swarm that hangs must not hang in silence."""
        while True:
            await asyncio.sleep(WATCH_S)
            what, age_s = self.awaits()
            if age_s > WATCH_S and what:
                log.warning("stage %d has waited %.0f s for %s", self.span.stage, age_s, what)

    async def serve_above(self, stream: FrameStream) -> None:
        """The link of the stage before, for as long as it lasts (called by the service)."""
        if self.above is not None:
            raise BadFrame(f"stage {self.span.stage} has a link from stage {self.span.stage - 1} already")
        self.above = Outbox(stream)
        stream.bound(partial(self.admission.largest, Direction.FORWARD))
        self.spawn(self.above.run())
        try:
            while (frame := await stream.receive()) is not None:
                await self._from_above(frame)
        except Exception as error:
            if not self._finished:
                self.fail(error)
            raise
        finally:  # also where the call is cancelled before its end is read, as gRPC does when the peer is gone
            self._link_closed(self.span.stage - 1)

    async def _read_below(self, stream: FrameStream) -> None:
        try:
            while (frame := await stream.receive()) is not None:
                self._from_below(frame)
        except PeerLost:
            if not self._finished:
                raise
        self._link_closed(self.span.stage + 1)

    def _link_closed(self, stage: int) -> None:
        """After the last decision neighbours may leave in any order; before it, nobody may."""
        if not self._finished:
            self.fail(PeerLost(f"stage {stage} closed its link at tick {self.position.tick}"))

    # Frames in ---------------------------------------------------------------------------------------------------------

    async def _from_above(self, frame: Frame) -> None:
        self.admission.check(frame.header)
        match frame.header.kind:
            case FrameKind.ACTIVATION:
                await self._room.acquire()
                self.work.put(key(frame.header), frame.header.microbatch, FrameKind.ACTIVATION, frame.payload)
                self.drive(ActivationCame(key(frame.header), frame.header.microbatch))
            case FrameKind.BATCH:
                self._post_below(frame)
                data = from_bytes(BatchData, frame.payload)
                size = self.manifest.config.swarm.microbatch_size
                batch = read_batch(data, size, self.manifest.vocab)
                self.admission.batches[batch.number] = batch
                self.work.deliver(partial(self.work.compute.add_batch, batch), Record(Kind.BATCH, bytes(frame.payload)))
            case FrameKind.BEGIN:
                self._post_below(frame)
                self.drive(Begun(self.admission.stamp(frame)))
            case FrameKind.DECIDE:
                self._post_below(frame)
                decide = self.admission.decision(frame)
                self.drive(Decided(decide, key(frame.header)))
                self.admission.decided(frame.header, decide)
            case kind:
                raise BadFrame(f"stage {self.span.stage - 1} sent {kind.name} down the link")

    def _from_below(self, frame: Frame) -> None:
        self.admission.check(frame.header)
        match frame.header.kind:
            case FrameKind.GRADIENT:
                self.work.put(key(frame.header), frame.header.microbatch, FrameKind.GRADIENT, frame.payload)
                self.drive(GradientCame(key(frame.header), frame.header.microbatch))
            case FrameKind.RESEND:
                if not self.admission.link.reuse:
                    raise BadFrame(
                        f"stage {self.span.stage + 1} asked for a packet again; these links keep no references"
                    )
                self.drive(ResendAsked(key(frame.header), frame.header.microbatch))
            case FrameKind.VOTE:
                self._ballot.came(from_bytes(Vote, frame.payload))
                self.drive(VoteCame(key(frame.header)))
            case kind:
                raise BadFrame(f"stage {self.span.stage + 1} sent {kind.name} up the link")

    async def take_bases(self, message: BasisSet) -> None:
        """A new version from the anchor. On a thread of its own: to check a wide basis takes up to a second."""
        bases = await asyncio.to_thread(read_bases, message, self.manifest, self.span.stage)
        self.work.deliver(
            partial(self.work.compute.add_bases, message.version, bases), Record(Kind.BASES, to_bytes(message))
        )

    async def _await_end(self) -> None:
        """The last decision is applied. Only the anchor can say that the books and the last checkpoint are complete."""
        wait_s = self.anchor.end_wait_s
        if self.anchor.away_since is not None:
            log.warning("stage %d has finished and waits for the anchor, up to %.0f s", self.span.stage, wait_s)
        await self.anchor.away_for(wait_s)
        raise AnchorAway(
            f"the run has finished at tick {self.position.tick}, but the anchor at {self.anchor.address} was away for "
            f"{wait_s:.0f} s: its books and its newest checkpoint lack what this stage still had to tell"
        )

    def stop(self, stop: Stop) -> None:
        """Leave now, or (stage 0) end the run after the tick under way."""
        if stop.now:
            if not self.over.done():
                self.over.set_result(stop.reason)
        elif self.zero is not None:
            log.info("stopping after this tick: %s", stop.reason)
            self.zero.lead.stop_requested = True
            self._advance()

    def take_rollouts(self, message: Rollouts) -> None:
        """What a sampler delivered (stage 0)."""
        if self.zero is None:
            raise BadFrame(f"rollouts came to stage {self.span.stage}; only stage 0 takes them")
        if message.exhausted:
            self.zero.lead.sampler_exhausted()
        else:
            try:
                self.zero.take_rollouts(read_rollouts(message, self.manifest.vocab))
            except LearningError as error:
                raise BadFrame(str(error)) from None
            # They are in stock already; that they have come is for the log alone.
            self.work.deliver(lambda: None, Record(Kind.ROLLOUTS, to_bytes(message), microbatch=message.batch))
        self._advance()

    # The schedule ------------------------------------------------------------------------------------------------------

    def drive(self, event: Event) -> None:
        """Feed the schedule one event and carry out what follows."""
        self.progress_at = time.monotonic()
        for command in self.schedule.handle(event):
            match command:
                case Compute():
                    self.spawn(self._compute(command))
                case AskAgain(stamp, microbatch):
                    self._ask_again(stamp, microbatch)
                case CastVote(stamp):
                    self._cast_vote(stamp)
                case Finished():
                    self._round_active = False
        if self.zero is not None and self.schedule.idle:
            self._advance()

    async def _compute(self, command: Compute) -> None:
        saving = command.decide is not None and command.decide.checkpoint
        result = await self.work.run(command, self.zero.state() if self.zero is not None and saving else None)
        stamp = command.stamp
        match command.op:
            case Op.FORWARD | Op.SCORE | Op.LOSS | Op.BACKWARD | Op.RESEND:
                if not self.span.is_first and command.op not in (Op.BACKWARD, Op.RESEND):
                    self._room.release()
                if isinstance(result, Packet):
                    await self._send_packet(command, result).room()  # no further work until the link has taken enough
            case Op.TALLY:
                self._ballot.tallied(result)
            case Op.APPLY:
                assert command.decide is not None
                await self._applied(stamp, command.decide, result)
        self.drive(result if isinstance(result, Lost) else Computed())

    async def _applied(self, stamp: Stamp, decide: Decide, done: Applied) -> None:
        self._finished = decide.stop
        if decide.stop:
            self.spawn(self._await_end())
        tick = done.position.tick
        if decide.end_of_batch:
            self.admission.ended(stamp.batch)
        if decide.publish:
            published = self.work.compute.published
            await self.service.publish(tick, published[tick], set(published))
        for sketch in done.sketches:
            matrix = matrix_of((sketch.boundary, sketch.direction), sketch.v_HR)
            numbers = (sketch.part, sketch.trace, sketch.rows_seen, sketch.packet_bytes)
            message = Sketch(sketch.version, stamp.tick, matrix, *numbers)
            self.anchor.post(Frame(Header(FrameKind.SKETCH, self.run_id, tick=stamp.tick), to_bytes(message)))
        self.slow.offer(done.capture)
        order = None
        if decide.stop and self.zero is not None:
            report, order = self.zero.ending()
            self._report(report)
        self.anchor.post_report(Report(type="ledger", tick=tick if decide.outcome == Outcome.HOLD else stamp.tick))
        if order is not None:
            await self.service.order(order)

    # Votes and what stage 0 leads --------------------------------------------------------------------------------------

    def _cast_vote(self, stamp: Stamp) -> None:
        busy_s, self.work.busy_s = self.work.busy_s, 0.0
        vote = self._ballot.cast(self.work.compute.newest_basis, busy_s, sorted(self.slow.held))
        vote.votes[0].numbers[f"{ANCHOR_WAIT}/stage_{self.span.stage}"] = self.anchor.take_wait_s()
        failpoints.hit("voting", self.span.stage, stamp.tick)
        if self.zero is None:
            assert self.above is not None
            header = header_of(FrameKind.VOTE, self.run_id, stamp, self.span.stage - 1)
            self.above.post(Frame(header, to_bytes(vote)))
            return
        if (
            len(newest := {v.basis_held for v in vote.votes}) == 1
        ):  # an older one may have passed by a stage that was cut off
            self._basis_held = newest.pop()
        batch = self.admission.batches[stamp.batch]
        tokens = sum(batch.layout(stamp.slice, i).tokens for i in range(stamp.microbatches))
        decide, row = self.zero.decide(stamp, vote.votes, vote.gated, tokens)
        state = self.zero.state()
        # A decision that somebody has heard is never taken back.
        self.work.redo.decide(Record(Kind.DECIDED, stamp=stamp, decide=decide, zero=state, row=to_bytes(row)))
        failpoints.hit("decided", 0, stamp.tick)
        self._send_decision(stamp, decide)
        self._report(row)

    def _send_decision(self, stamp: Stamp, decide: Decide) -> None:
        self._round_active = True  # until it is applied
        self._post_below(Frame(header_of(FrameKind.DECIDE, self.run_id, stamp, 0), to_bytes(decide)))
        self.drive(Decided(decide, stamp.key))

    def _advance(self) -> None:
        """Stage 0, whenever nothing is under way: order rollouts, begin the next round, or hold."""
        if self.zero is None:
            return
        lead = self.zero.lead
        self._order()
        if self._round_active or not self.schedule.idle or lead.finished:
            return
        hold = lead.hold()
        if hold is not None:
            self._send_decision(Stamp(epoch=self.position.epoch, tick=self.position.tick), hold)
            return
        batch, dropped = self.zero.next_batch(self._basis_held)
        if dropped is not None:
            self._report(dropped)
        if batch is not None:
            self.admission.batches[batch.number] = batch
            record = Record(Kind.BATCH, microbatch=batch.number)
            self.work.deliver(partial(self.work.compute.add_batch, batch), record)
            header = Header(FrameKind.BATCH, self.run_id, self.position.epoch, self.position.tick, batch=batch.number)
            self._post_below(Frame(header, to_bytes(batch_data(batch, self.manifest.vocab))))
        if batch is not None or dropped is not None:
            self._order()  # with overlap, the next batch is generated while this one trains
        stamp = lead.next_round(self.slow.held)
        if stamp is not None:
            self._round_active = True
            begin = Begin(stamp.microbatches, stamp.basis_version, stamp.correction, stamp.step)
            self._post_below(Frame(header_of(FrameKind.BEGIN, self.run_id, stamp, 0), to_bytes(begin)))
            self.drive(Begun(stamp))

    def _order(self) -> None:
        if self.zero is None or (order := self.zero.lead.next_order()) is None:
            return
        if (kept := self.zero.kept.pop(order.batch, None)) is not None:
            self.zero.take_rollouts(read_rollouts(kept, self.manifest.vocab))
            order.generate = False
        if order.generate or order.evaluate:
            self.spawn(self.service.order(order))

    # Frames out --------------------------------------------------------------------------------------------------------

    def _ask_again(self, stamp: Stamp, microbatch: int) -> None:
        """This activation refers to rows of an earlier pass that are not held here: the sender is to send it whole."""
        assert self.above is not None
        log.warning("stage %d: activation %d of tick %d is asked for whole", self.span.stage, microbatch, stamp.tick)
        self.above.post(Frame(header_of(FrameKind.RESEND, self.run_id, stamp, self.span.stage - 1, microbatch)))

    def _send_packet(self, command: Compute, packet: Packet) -> Outbox:
        up = command.op in (Op.LOSS, Op.BACKWARD)
        kind = FrameKind.GRADIENT if up else FrameKind.ACTIVATION
        receiver = self.span.stage - 1 if up else self.span.stage + 1
        header = header_of(kind, self.run_id, command.stamp, receiver, command.microbatch)
        frame = Frame(header, packet.payload, dense_bytes=packet.dense_bytes)
        if up:
            assert self.above is not None
            self.above.post(frame)
            return self.above
        assert self.below is not None
        self.below.post(frame, sent=lambda: self.drive(Sent()))
        return self.below

    def _post_below(self, frame: Frame) -> None:
        """To the next stage, if there is one, readdressed on the way."""
        if self.below is not None:
            header = replace(frame.header, receiver=address_of(self.span.stage + 1))
            self.below.post(Frame(header, frame.payload))

    def _report(self, report: Report) -> None:
        self.anchor.post_report(report)
