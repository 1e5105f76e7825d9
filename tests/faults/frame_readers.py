"""The real readers of every kind of frame, put together as the programs put them together. No test is here.

`Readers.take(to, chunks)` feeds gRPC messages to the assembler with the limits of that stream, and what comes out to
whatever the program would give it to. It raises what the program would meet.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from frame_corpus import (
    BATCH,
    FORMS,
    LINEAGE,
    LINKS,
    STAGES,
    TICK,
    TINY,
    VERSION,
    bases,
    basis_set,
    batch,
    manifest,
    rows,
    stamp,
)

from anchor_node.books import Books
from anchor_node.calibrator import BasisKeeper
from anchor_node.corrector import Corrector
from anchor_node.replay_store import SnapshotRefused
from anchor_node.roster import Roster
from anchor_node.service import REPORT_LIMIT, AnchorService
from codec.errors import CodecError
from codec.spec import Direction
from swarm_core.errors import KedgeError
from swarm_core.learning.errors import LearningError
from swarm_core.learning.objective import make_objective
from swarm_core.manifest import Manifest, read_manifest
from swarm_core.models.reading import load_stage
from swarm_core.wire import messages as m
from swarm_core.wire.bases import largest_set_bytes
from swarm_core.wire.beats import Heart, Pulse
from swarm_core.wire.door import HELLO_LIMIT
from swarm_core.wire.errors import BadFrame, Refused
from swarm_core.wire.frames import Assembler, Frame, run_id
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import FrameKind, Mode, from_bytes
from swarm_core.wire.rollouts import read_batch, read_rollouts
from swarm_worker.admission import Admission
from swarm_worker.compute import Tally
from swarm_worker.correcting import Correcting, CorrectionRefused
from swarm_worker.headers import Position, key
from swarm_worker.journal import Journal
from swarm_worker.lead import Lead
from swarm_worker.link_ends import LinkEnd
from swarm_worker.membership import ANCHOR_LIMITS, CORRECTION_BESIDE, Membership, await_start, read_bases
from swarm_worker.restoring import check_listed
from swarm_worker.sampler.weights import read_weights
from swarm_worker.schedule import (
    ActivationCame,
    Begun,
    Computed,
    Decided,
    GradientCame,
    ResendAsked,
    Schedule,
    VoteCame,
)
from swarm_worker.service import ROLLOUT_LIMIT
from swarm_worker.slow_circuit import SlowCircuit
from swarm_worker.snapshots import SnapshotShipper
from swarm_worker.stage_zero import StageZero
from swarm_worker.voting import Ballot

# A stream that is served ends with a status for these; anything else is a traceback in somebody's log.
SERVED = (Refused,)
# Elsewhere a program ends, or goes on, with one readable line.
TYPED = (KedgeError, CodecError, SnapshotRefused, CorrectionRefused)
WEIGHTS_LIMIT = 1 << 22


class Untyped(Exception):
    """A reader raised what nobody translates."""


class Readers:
    """One of each. `done` closes what is open; what an accepted frame has moved is put back, or does not matter."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._anchors, self._loop = folder, 0, asyncio.new_event_loop()
        self._links = {name: _LinkReader(name) for name in LINKS}
        self._corrections = {form: _CorrectionReader(form) for form in FORMS}
        self._zero = _StageZeroReader(folder)
        self.anchor = _AnchorReader(folder / "anchor-0", self._loop)
        self.accepted = 0

    def take(self, to: str, chunks: Iterable[bytes]) -> None:
        """Raises what is in TYPED, or Untyped."""
        name, _, which = to.partition(", ")
        reader: Callable[[list[bytes]], object]
        match name:
            case "stage":
                reader = self._links[which].from_above
            case "gradient":
                reader = self._links[which].from_below
            case "stage 0":
                reader = self._zero.vote
            case "feed":
                reader = self._zero.feed
            case "correction":
                reader = self._corrections[which].take
            case "anchor":
                reader = partial(self.anchor.take, which)
            case "greeting":
                reader = self.anchor.greet
            case _:
                reader = {"from the anchor": from_anchor, "sampler": sampler, "doctor and status": looked}[name]
        try:
            reader(list(chunks))
            self.accepted += 1
        except TYPED:
            raise
        except Exception as error:
            raise Untyped(f"{to}: {type(error).__name__}: {error}") from error
        finally:
            self._refresh()

    def _refresh(self) -> None:
        """An anchor that was brought to its end, or that has taken many frames, is followed by another."""
        if self.anchor.service.over.done() or self.anchor.taken > 500:
            self.anchor.close()
            self._anchors += 1
            self.anchor = _AnchorReader(self._folder / f"anchor-{self._anchors}", self._loop)

    def close(self) -> None:
        self.anchor.close()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        for loop in (self._loop, *(each._loop for each in self._corrections.values())):
            loop.close()
        self._zero.journal.close()


def frames(chunks: list[bytes], assembler: Assembler) -> Iterator[Frame]:
    """The whole frames that come out, WARM ones apart, which nobody is given."""
    for chunk in chunks:
        frame = assembler.feed(chunk)
        if frame is not None and frame.header.kind is not FrameKind.WARM:
            yield frame


@contextlib.contextmanager
def served() -> Iterator[None]:
    """What is raised here ends a served stream, and has to have a status."""
    try:
        yield
    except SERVED:
        raise
    except Exception as error:
        raise Untyped(f"on a served stream: {type(error).__name__}: {error}") from error


class _LinkReader:
    """Stage 1 of three, on links of one kind: what stage 0 and stage 2 send it (swarm_worker/worker.py)."""

    def __init__(self, name: str) -> None:
        self.of = manifest(name)
        of = self.of
        held = {VERSION: bases(of)} if bases(of) else {}
        self._above, self._below = LinkEnd(of, 0, held, None), LinkEnd(of, 0, held, None)
        crossing = batch(of.vocab).crossing(0, 0, share=of.config.links.shares_prompts)
        sender, score = LinkEnd(of, 0, held, None), stamp(of, Mode.SCORE)
        packet = sender.encode(rows(of, 1), Direction.FORWARD, score, crossing, 0).payload
        self._above.decode(packet, Direction.FORWARD, score, crossing, 0)
        self._above.settle(keep=True)

    def from_above(self, chunks: list[bytes]) -> None:
        of, whole = self.of, batch(self.of.vocab)
        position = Position(TICK, LINEAGE, 1)
        admission = Admission(1, run_id(of.digest()), of.link(), of.config.links, position, {BATCH: whole})
        schedule = Schedule(1, STAGES)
        for mode in (Mode.TRAIN, Mode.SCORE, Mode.PROBE):
            schedule.handle(Begun(stamp(of, mode)))
        assembler = Assembler({})
        assembler.limit = partial(admission.largest, Direction.FORWARD)
        for frame in frames(chunks, assembler):
            with served():
                self._admit(frame, admission, schedule)
            if frame.header.kind is FrameKind.ACTIVATION:
                self._decode(frame, self._above, Direction.FORWARD)

    def _admit(self, frame: Frame, admission: Admission, schedule: Schedule) -> None:
        admission.check(frame.header)
        match frame.header.kind:
            case FrameKind.ACTIVATION:
                schedule.handle(ActivationCame(key(frame.header), frame.header.microbatch))
            case FrameKind.BATCH:
                size = self.of.config.swarm.microbatch_size
                made = read_batch(from_bytes(m.BatchData, frame.payload), size, self.of.vocab)
                admission.batches[made.number] = made
                for slice_ in range(len(made.microbatches)):  # what the first packets of it would ask for
                    header = replace(
                        frame.header, kind=FrameKind.ACTIVATION, batch=made.number, slice=slice_, microbatch=0
                    )
                    for mode in (Mode.TRAIN, Mode.PROBE):
                        with contextlib.suppress(BadFrame):
                            admission.largest(Direction.FORWARD, replace(header, mode=mode))
            case FrameKind.BEGIN:
                Schedule(1, STAGES).handle(Begun(admission.stamp(frame)))
            case FrameKind.DECIDE:
                decide, schedule = admission.decision(frame), _voted(self.of)
                schedule.handle(Decided(decide, key(frame.header)))
                admission.decided(frame.header, decide)
            case kind:
                raise BadFrame(f"stage 0 sent {kind.name} down the link")

    def from_below(self, chunks: list[bytes]) -> None:
        """Stage 1 has sent its activations of the tick and of the probe, and waits for their gradients."""
        of = self.of
        position = Position(TICK, LINEAGE, 1)
        admission = Admission(0, run_id(of.digest()), of.link(), of.config.links, position, {BATCH: batch(of.vocab)})
        schedule = Schedule(0, STAGES)
        schedule.handle(Begun(stamp(of)))
        schedule.handle(Computed())
        assembler = Assembler({})
        assembler.limit = partial(admission.largest, Direction.BACKWARD)
        for frame in frames(chunks, assembler):
            admission.check(frame.header)
            match frame.header.kind:
                case FrameKind.GRADIENT:
                    schedule.handle(GradientCame(key(frame.header), frame.header.microbatch))
                    self._decode(frame, self._below, Direction.BACKWARD)
                case FrameKind.RESEND:
                    schedule.handle(ResendAsked(key(frame.header), frame.header.microbatch))
                case FrameKind.VOTE:
                    Ballot(0).came(from_bytes(m.Vote, frame.payload))
                    schedule.handle(VoteCame(key(frame.header)))
                case kind:
                    raise BadFrame(f"stage 2 sent {kind.name} up the link")

    def _decode(self, frame: Frame, end: LinkEnd, direction: Direction) -> None:
        """As the compute thread does, in the round that the schedule has found the frame to be of."""
        h, whole = frame.header, batch(self.of.vocab)
        slice_, index = (h.slice, h.microbatch) if h.mode is Mode.TRAIN else whole.place(h.microbatch)
        if h.mode is Mode.PROBE:
            whole, slice_, index = whole.probe(h.slice, self.of.config.links.fidelity_sequences), 0, 0
        crossing = whole.crossing(slice_, index, share=self.of.config.links.shares_prompts)
        try:
            decoded = end.decode(frame.payload, direction, stamp(self.of, h.mode), crossing, h.microbatch)
            assert bool(torch.isfinite(decoded).all()), "a decoded tensor is not finite"
        finally:
            end.sizes.fault()
            end._scoring = None
            end.settle(keep=False)


def _voted(of: Manifest) -> Schedule:
    """Stage 1 when it has voted on an empty tick."""
    schedule, empty = Schedule(1, STAGES), replace(stamp(of), microbatches=0)
    for event in (Begun(empty), Computed(), VoteCame(empty.key)):
        schedule.handle(event)
    return schedule


class _StageZeroReader:
    """Stage 0: votes from below, rollouts from a sampler."""

    def __init__(self, folder: Path) -> None:
        self.of = manifest("uniform")
        objective = make_objective(self.of.config, torch.device("cpu"))
        self.journal = Journal(folder / "journal.jsonl", 0)
        self._zero = StageZero(self.of, objective.spec, torch.float32, self.journal, Lead(None).state, None, {})  # type: ignore[arg-type]
        self._plan = self._zero.lead.plan

    def vote(self, chunks: list[bytes]) -> None:
        for frame in frames(chunks, Assembler({})):
            if frame.header.kind is not FrameKind.VOTE:
                raise BadFrame(f"stage 1 sent {frame.header.kind.name} up the link")
            ballot, lead = Ballot(0), Lead(self._plan)
            ballot.tallied(Tally([1.0, 2.0], "", False, {"correction/sum/dose_sq": 1.0}))
            ballot.came(from_bytes(m.Vote, frame.payload))
            vote = ballot.cast(VERSION, 0.1, [1])
            lead.state.plan = [(1, 0), (1, 1)]
            self._zero.lead = lead
            self._zero.decide(stamp(self.of), vote.votes, vote.gated, 10)

    def feed(self, chunks: list[bytes]) -> None:
        with served():
            for frame in frames(chunks, Assembler({FrameKind.ROLLOUTS: ROLLOUT_LIMIT})):
                if frame.header.kind is FrameKind.FETCH:
                    from_bytes(m.Fetch, frame.payload)
                elif frame.header.kind is FrameKind.ROLLOUTS:
                    self._take(from_bytes(m.Rollouts, frame.payload))
                else:
                    raise BadFrame(f"a sampler sent {frame.header.kind.name}")

    def _take(self, message: m.Rollouts) -> None:
        lead = self._zero.lead = Lead(self._plan)
        lead.next_order()
        if message.exhausted:
            lead.sampler_exhausted()
            return
        try:
            self._zero.take_rollouts(read_rollouts(message, self.of.vocab))
        except LearningError as error:
            raise BadFrame(str(error)) from None
        self._zero._stats.clear()


class _CorrectionReader:
    """Stage 1, of corrections in one form (swarm_worker/slow_circuit.py)."""

    def __init__(self, form: str) -> None:
        of = manifest("uniform", form)
        parameters = [torch.nn.Parameter(t.float()) for t in load_stage(TINY / "model", of.spans[1]).values()]
        self._correcting = Correcting(of, 1, parameters, [None] * len(parameters))
        self._correcting._taken[2] = (2, LINEAGE)
        self._circuit = SlowCircuit.__new__(SlowCircuit)
        self._circuit._correcting = self._correcting
        self._circuit._work = cast(Any, _Work())
        self._loop = asyncio.new_event_loop()

    def take(self, chunks: list[bytes]) -> None:
        most = self._correcting.largest_packet + CORRECTION_BESIDE
        for frame in frames(chunks, Assembler(ANCHOR_LIMITS | {FrameKind.CORRECTION: most})):
            if frame.header.kind is FrameKind.CORRECTION:
                self._loop.run_until_complete(self._circuit._checked(frame))


class _Work:
    position = Position(TICK, LINEAGE, 1)


@cache
def _held_before() -> m.BasisSet:
    return basis_set(manifest("uniform"), VERSION - 1)


def from_anchor(chunks: list[bytes]) -> None:
    """What a member is told: manifest, bases, start, end (swarm_worker/membership.py, worker.py)."""
    of = manifest("uniform")
    membership = Membership(cast(Any, None), of, "", cast(Any, SimpleNamespace(pulse=Pulse())), _held_before())
    shipper = SnapshotShipper(lambda *_: None, of.vocab)
    limits = ANCHOR_LIMITS | {FrameKind.BASIS: largest_set_bytes(of.link(), of.boundaries)}
    for frame in frames(chunks, Assembler(limits)):
        match frame.header.kind:
            case FrameKind.WELCOME:
                read_manifest(from_bytes(m.Welcome, frame.payload).manifest)
            case FrameKind.BASIS:
                read_bases(membership.take_bases(frame), of, None)
            case FrameKind.START:
                membership.anchor = cast(Any, _Once(frame))
                with contextlib.suppress(StopIteration):  # it never waits: the one frame is there
                    await_start(membership, lambda _: None).send(None)
            case FrameKind.STOP:
                from_bytes(m.Stop, frame.payload)
            case FrameKind.SNAPSHOT_HELD:
                shipper.held(from_bytes(m.SnapshotHeld, frame.payload))
            case FrameKind.BOOKED:
                from_bytes(m.Booked, frame.payload)
            case FrameKind.COPY_HELD:
                from_bytes(m.CopyHeld, frame.payload)
            case FrameKind.COPIES:
                check_listed(from_bytes(m.Copies, frame.payload), 1, STAGES)
            case FrameKind.COPY:
                from_bytes(m.Copy, frame.payload)
            case FrameKind.FENCE:
                from_bytes(m.Fence, frame.payload)
            case FrameKind.CHECK:
                from_bytes(m.Check, frame.payload)
            case FrameKind.BEAT:
                Heart(cast(Any, None)).take(frame)
            case kind:
                raise BadFrame(f"the anchor sent {kind.name}")


def looked(chunks: list[bytes]) -> None:
    """What doctor and status ask and are told (swarm_worker/doctor.py, anchor_node/probing.py, status.py)."""
    kinds = {FrameKind.STATUS: m.Status, FrameKind.TRIAL: m.Trial, FrameKind.TRIED: m.Tried}
    for frame in frames(chunks, Assembler({})):
        if frame.header.kind in kinds:
            from_bytes(kinds[frame.header.kind], frame.payload)
        elif frame.header.kind is not FrameKind.LOAD:
            raise BadFrame(f"{frame.header.kind.name} came")


class _Once:
    """A stream with one frame."""

    def __init__(self, frame: Frame) -> None:
        self._frames = [frame]

    async def receive(self) -> Frame | None:
        return self._frames.pop() if self._frames else None


def sampler(chunks: list[bytes]) -> None:
    """What a stage sends a sampler (swarm_worker/sampler/process.py)."""
    for frame in frames(chunks, Assembler({FrameKind.WEIGHTS: WEIGHTS_LIMIT})):
        match frame.header.kind:
            case FrameKind.ORDER:
                from_bytes(m.Order, frame.payload)
            case FrameKind.WEIGHTS:
                read_weights(memoryview(frame.payload), 0, frame.header.tick)
            case kind:
                raise BadFrame(f"stage 0 sent {kind.name}")


class _AnchorReader:
    """A real AnchorService with a keeper and a corrector, three stages attending; posts go nowhere."""

    def __init__(self, folder: Path, loop: asyncio.AbstractEventLoop) -> None:
        self.taken, self._loop = 0, loop
        self._loop.run_until_complete(self._open(folder))
        self._log = _Errors()
        logging.getLogger("anchor_node").addHandler(self._log)

    async def _open(self, folder: Path) -> None:
        of = manifest("uniform")
        with mock.patch("anchor_node.service.Server"):  # gRPC never lets go of a server that was not started
            service = self.service = AnchorService(of, cast(Any, _Quiet()), folder, [], Ledger())
        service.books = Books(folder)
        service.tick = service.memory.tick = TICK
        service.slow.keeper = BasisKeeper(of.link(), of.boundaries, basis_set(of), of.config.links.fit)
        fires, slow = of.fires(), service.slow
        assert fires is not None
        slow.corrector = Corrector(
            of, TINY / "model", folder, torch.device("cpu"), fires,
            send=slow.send_correction, event=service.event, now=lambda: service.tick,
            bases=lambda _version: bases(of), adopt=slow.adopt_bases,
        )  # fmt: skip
        for stage in range(STAGES):
            member = service.roster.join(m.Hello("stage", stage, address=f"10.0.0.{stage}:1", member=stage + 1))
            service.stages[stage] = cast(Any, _Nowhere())
            service.memory.enter(member.number, f"stage {stage}")
        service.memory.enter(9, "sampler")

    def take(self, whose: str, chunks: list[bytes]) -> None:
        """Of stage 1, or of whom `whose` says."""
        self.taken += 1
        stage = int(whose.rpartition(" ")[2]) if "stage" in whose else 1
        limits = {FrameKind.REPORT: REPORT_LIMIT} | self.service.slow.limits()
        for frame in frames(chunks, Assembler({} if "sampler" in whose else limits)):
            with served():
                self._loop.run_until_complete(self._given(stage, "sampler" in whose, frame))
        if self._log.said:
            raise Untyped(self._log.said.pop())

    async def _given(self, stage: int, sampler: bool, frame: Frame) -> None:
        service, box = self.service, cast(Any, _Nowhere())
        if sampler:
            if frame.header.kind is not FrameKind.REPORT:
                raise BadFrame(f"a sampler sent {frame.header.kind.name}")
            service.samplers._take(9, box, service.read_report(frame))
            return
        member = service.roster.members[stage]
        member.at_work = frame.header.kind is FrameKind.COPY
        service._from_stage(member, box, frame)
        while tasks := service.slow._taking | service.off_host._tasks:
            await asyncio.wait(set(tasks))
        assert "event copy_failed" not in service.screen.at

    def greet(self, chunks: list[bytes]) -> None:
        of = manifest("uniform")
        with served():
            for frame in frames(chunks, Assembler({}, HELLO_LIMIT)):
                if frame.header.kind is not FrameKind.HELLO:
                    raise BadFrame("a HELLO was expected")
                hello = from_bytes(m.Hello, frame.payload)
                roster = Roster(STAGES, of.digest(), of.model_fingerprint, {77})
                roster.join(hello) if hello.role == "stage" else roster.greet(hello, "sampler")

    def close(self) -> None:
        logging.getLogger("anchor_node").removeHandler(self._log)
        self.service.books.close()
        if self.service.over.done() and not self.service.over.cancelled():
            self.service.over.exception()
        assert self.service.slow.corrector is not None
        self.service.slow.corrector._thread.shutdown(wait=False)


class _Nowhere:
    def post(self, frame: Frame) -> None: ...


class _Quiet:
    def update(self, row: dict[str, Any]) -> None: ...

    def bytes_update(self, totals: dict[str, list[int]]) -> None: ...


class _Errors(logging.Handler):
    """What the slow circuit catches so that a run goes on, and calls a bug or a full disk."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.said.append(f"{record.getMessage()}: {type(error).__name__}: {error}")


def peak_bytes(reset: bool = False) -> int:
    """The most memory that this process has held, since the last reset where the kernel can (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
