"""The compute thread of a stage: takes a command of the schedule, finds its payload, does it on the one thread, times it.

What arrives for it is handed over, never written into its state from outside; what a decision entails (step, publish, copy
for a checkpoint) is one piece of work. Everything that is done here is written to the redo log first to last, and is on disk before the
tally that a vote is made of is handed out. No stream and no frame is touched here.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from codec.errors import CodecError, ReferenceMismatch
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import Decide, FrameKind, Mode, Outcome
from swarm_worker import failpoints
from swarm_worker.compute import SketchOut, StageCompute
from swarm_worker.correcting import Capture
from swarm_worker.headers import Position, RoundKey
from swarm_worker.redo import Kind, Record, Redo
from swarm_worker.saving import Saving
from swarm_worker.schedule import Compute, Lost, Op, Stamp
from swarm_worker.shard import Shard, snapshot
from swarm_worker.vitals import Toil

Payload = memoryview | bytes | bytearray
PACKET_OF = {
    Op.FORWARD: FrameKind.ACTIVATION,
    Op.SCORE: FrameKind.ACTIVATION,
    Op.LOSS: FrameKind.ACTIVATION,
    Op.BACKWARD: FrameKind.GRADIENT,
}


@dataclass(frozen=True)
class Applied:
    """What came of a decision."""

    position: Position
    sketches: list[SketchOut]
    snapshot: Shard | None = None  # of what a checkpoint is to hold
    capture: Capture | None = None


class ComputeThread:
    """One thread around one StageCompute. Its methods are called from the event loop; `position` is the newest applied."""

    def __init__(
        self, compute: StageCompute, executor: ThreadPoolExecutor, saving: Saving, position: Position, redo: Redo
    ) -> None:
        self.compute = compute
        self.redo = redo
        self.position = position
        self.saving = saving
        self.busy_s = 0.0
        self.toil = Toil()
        self._executor = executor
        self._deliveries: deque[tuple[Callable[[], None], Record]] = deque()
        self._payloads: dict[tuple[RoundKey, int, FrameKind], Payload] = {}

    def deliver(self, take_in: Callable[[], None], record: Record) -> None:
        """Something to take in before the next piece of work: only the thread itself touches its state."""
        self._deliveries.append((take_in, record))

    def put(self, key: RoundKey, microbatch: int, kind: FrameKind, payload: Payload) -> None:
        """A packet that a later command will be about."""
        self._payloads[(key, microbatch, kind)] = payload

    async def run(self, command: Compute, stage_zero: dict[str, Any] | None) -> Any:
        """Do one command; returns what the compute method returned, `Applied`, or `Lost` for a packet that refers to what
        is not held here. Raises BadFrame for a bad packet.

        `stage_zero` is what a checkpoint keeps of stage 0's lead, on stage 0 when this command saves.
        """
        loop = asyncio.get_running_loop()
        saves = command.decide is not None and command.decide.checkpoint
        if saves:
            await self.saving.room(self.position.after(command.stamp, command.decide).tick)
        with self.toil.over("apply and copy" if saves else command.op.value):
            result, busy_s = await loop.run_in_executor(self._executor, self._timed, command, stage_zero)
        self.busy_s += busy_s
        if isinstance(result, Applied):
            self.position = result.position
            if result.snapshot is not None:
                self.saving.begin(result.position.tick, result.snapshot)
        return result

    def _timed(self, command: Compute, stage_zero: dict[str, Any] | None) -> tuple[Any, float]:
        """On the thread, so that waking the two threads counts as waiting."""
        started = time.monotonic()
        while self._deliveries:
            take_in, record = self._deliveries.popleft()
            take_in()
            self.redo.append(record)
        try:
            result = self._do(command, stage_zero)
        except ReferenceMismatch:
            result = Lost()
        except CodecError as error:
            where = f"stage {self.compute.span.stage}, {command.op.value} of tick {command.stamp.tick}"
            raise BadFrame(f"{where}, microbatch {command.microbatch}: {error}") from None
        return result, time.monotonic() - started

    def _do(self, command: Compute, stage_zero: dict[str, Any] | None) -> Any:
        stamp, op, microbatch = command.stamp, command.op, command.microbatch
        if op is Op.APPLY:
            assert command.decide is not None
            return self._apply(stamp, command.decide, stage_zero)
        packet = self._payloads.pop((stamp.key, microbatch, PACKET_OF[op]), None) if op in PACKET_OF else None
        if op is Op.FORWARD:
            self._may_die("forward", stamp.tick)
        result = carry_out(self.compute, op, stamp, microbatch, packet)
        if stamp.mode is not Mode.PROBE and op is not Op.RESEND:  # which change nothing
            self.redo.append(Record(Kind.COMPUTE, bytes(packet or b""), op, stamp, microbatch))
        if op is Op.TALLY:
            self._may_die("tallied", stamp.tick)
            self.redo.sync()
        return result

    def _apply(self, stamp: Stamp, decide: Decide, stage_zero: dict[str, Any] | None) -> Applied:
        self._may_die("applying", stamp.tick)
        if decide.outcome != Outcome.HOLD and not self.compute.span.is_first:  # stage 0 did so before it told others
            self.redo.append(Record(Kind.DECIDED, stamp=stamp, decide=decide))
        sketches = self.compute.apply(stamp, decide)
        position = self.position.after(stamp, decide)
        self._may_die("applied", stamp.tick)
        if decide.publish:
            self.compute.publish(position.tick)
        shard = None
        if decide.checkpoint and not self.redo.has_shard((position.tick, position.lineage)):
            shard = copy_of(self.compute, position, stage_zero)
            self.redo.turn((position.tick, position.lineage))
        return Applied(position, sketches, shard, self.compute.take_capture())

    def _may_die(self, point: str, tick: int) -> None:
        failpoints.hit(point, self.compute.span.stage, tick)


def copy_of(compute: StageCompute, position: Position, stage_zero: dict[str, Any] | None) -> Shard:
    """What a checkpoint of this position holds. `stage_zero`: what it keeps of stage 0's lead."""
    meta = {"tick": position.tick, "lineage": position.lineage, "stage_zero": stage_zero}
    return snapshot(compute.to_shard(meta))


def carry_out(compute: StageCompute, op: Op, stamp: Stamp, microbatch: int, packet: Payload | None) -> Any:
    """One command of the schedule, but for APPLY; the packet it is about, if any. Raises CodecError."""
    match op:
        case Op.FORWARD:
            return compute.forward(stamp, microbatch, packet)
        case Op.SCORE:
            return compute.score(stamp, microbatch, packet)
        case Op.LOSS:
            return compute.loss(stamp, microbatch, packet)
        case Op.BACKWARD:
            assert packet is not None
            return compute.backward(stamp, microbatch, packet)
        case Op.RESEND:
            return compute.resend(stamp, microbatch)
        case Op.COMPARE:
            return compute.compare(stamp)
        case Op.TALLY:
            return compute.tally(stamp)
    raise ValueError(f"{op} is not carried out here")
