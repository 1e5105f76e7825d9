"""The compute thread of a stage: takes a command of the schedule, finds its payload, does it on the one thread, times it.

What arrives for it is handed over, never written into its state from outside; what a decision entails (step, publish, save)
is one piece of work. No stream and no frame is touched here.
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
from swarm_core.wire.messages import Decide, FrameKind, Saved
from swarm_worker.compute import SketchOut, StageCompute
from swarm_worker.correcting import Capture
from swarm_worker.headers import Position, RoundKey
from swarm_worker.schedule import Compute, Lost, Op, Stamp
from swarm_worker.shard import ShardWriter
from swarm_worker.vitals import Toil

Payload = memoryview | bytes | bytearray


@dataclass(frozen=True)
class Applied:
    """What came of a decision."""

    position: Position
    sketches: list[SketchOut]
    saved: Saved | None
    capture: Capture | None = None


class ComputeThread:
    """One thread around one StageCompute. Its methods are called from the event loop; `position` is the newest applied."""

    def __init__(
        self, compute: StageCompute, executor: ThreadPoolExecutor, shards: ShardWriter, position: Position
    ) -> None:
        self.compute = compute
        self.position = position
        self.busy_s = 0.0
        self.toil = Toil()
        self._executor = executor
        self._shards = shards
        self._deliveries: deque[Callable[[], None]] = deque()
        self._payloads: dict[tuple[RoundKey, int, FrameKind], Payload] = {}

    def deliver(self, take_in: Callable[[], None]) -> None:
        """Something to take in before the next piece of work: only the thread itself touches its state."""
        self._deliveries.append(take_in)

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
        with self.toil.over("apply and save" if saves else command.op.value):
            result, busy_s = await loop.run_in_executor(self._executor, self._timed, command, stage_zero)
        self.busy_s += busy_s
        if isinstance(result, Applied):
            self.position = result.position
        return result

    def _timed(self, command: Compute, stage_zero: dict[str, Any] | None) -> tuple[Any, float]:
        """On the thread, so that waking the two threads counts as waiting."""
        started = time.monotonic()
        while self._deliveries:
            self._deliveries.popleft()()
        try:
            result = self._do(command, stage_zero)
        except ReferenceMismatch:
            result = Lost()
        except CodecError as error:
            where = f"stage {self.compute.span.stage}, {command.op.value} of tick {command.stamp.tick}"
            raise BadFrame(f"{where}, microbatch {command.microbatch}: {error}") from None
        return result, time.monotonic() - started

    def _do(self, command: Compute, stage_zero: dict[str, Any] | None) -> Any:
        stamp, microbatch = command.stamp, command.microbatch
        match command.op:
            case Op.FORWARD:
                return self.compute.forward(stamp, microbatch, self._take(stamp, microbatch, FrameKind.ACTIVATION))
            case Op.SCORE:
                return self.compute.score(stamp, microbatch, self._take(stamp, microbatch, FrameKind.ACTIVATION))
            case Op.LOSS:
                return self.compute.loss(stamp, microbatch, self._take(stamp, microbatch, FrameKind.ACTIVATION))
            case Op.BACKWARD:
                packet = self._take(stamp, microbatch, FrameKind.GRADIENT)
                assert packet is not None
                return self.compute.backward(stamp, microbatch, packet)
            case Op.RESEND:
                return self.compute.resend(stamp, microbatch)
            case Op.COMPARE:
                return self.compute.compare(stamp)
            case Op.TALLY:
                return self.compute.tally(stamp)
            case Op.APPLY:
                assert command.decide is not None
                return self._apply(stamp, command.decide, stage_zero)

    def _take(self, stamp: Stamp, microbatch: int, kind: FrameKind) -> Payload | None:
        return self._payloads.pop((stamp.key, microbatch, kind), None)

    def _apply(self, stamp: Stamp, decide: Decide, stage_zero: dict[str, Any] | None) -> Applied:
        sketches = self.compute.apply(stamp, decide)
        position = self.position.after(stamp, decide)
        if decide.publish:
            self.compute.publish(position.tick)
        saved = None
        if decide.checkpoint:
            meta = {"tick": position.tick, "lineage": position.lineage, "stage_zero": stage_zero}
            saved = self._shards.write(position.tick, lambda: self.compute.to_shard(meta))
        return Applied(position, sketches, saved, self.compute.take_capture())
