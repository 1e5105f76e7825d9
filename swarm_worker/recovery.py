"""Rebuilding a stage at a version: a shard or the initial weights, then the redo log through the same code as the first time.

What comes out is bit for bit what the stage held after that decision, whoever died in between. No stream is known here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarm_core.run_folder import CHECKPOINTS, checkpoint_name
from swarm_core.wire.messages import (
    BasisSet,
    BatchData,
    Correction,
    Decide,
    Outcome,
    Report,
    Rollouts,
    from_bytes,
)
from swarm_core.wire.rollouts import read_batch, read_rollouts
from swarm_worker.compute import StageCompute
from swarm_worker.compute_thread import carry_out, copy_of
from swarm_worker.headers import Position
from swarm_worker.membership import read_bases
from swarm_worker.redo import Kind, Record, Redo, Version
from swarm_worker.schedule import Stamp
from swarm_worker.shard import Shard, ShardError, read_shard, shard_name
from swarm_worker.stage_zero import batch_of

log = logging.getLogger(__name__)


@dataclass
class Rebuilt:
    """A stage at a version, and on stage 0 what it is to lead on with."""

    compute: StageCompute
    position: Position
    decide: Decide | None = None  # what led there, where the log has it
    zero: dict[str, Any] | None = None  # stage 0: the lead's state and the reward metrics of open batches
    rows: list[Report] = field(default_factory=list)  # stage 0: of the ticks that were done again
    rollouts: list[Rollouts] = field(default_factory=list)  # stage 0: delivered, and not yet trained on
    copies: list[tuple[int, Shard]] = field(default_factory=list)  # of checkpoints that were decided and not written


class Rebuilding:
    """One attempt, from a fresh StageCompute. Runs on the compute thread."""

    def __init__(
        self, compute: StageCompute, shard: Shard | None, epoch: int, has_shard: Callable[[Version], bool]
    ) -> None:
        """`has_shard` says of a version whether it is in a shard: what the last process did not come to write is due."""
        self._compute, self._has_shard = compute, has_shard
        self._stock: dict[int, Rollouts] = {}
        self.done = Rebuilt(compute, Position(epoch=epoch))
        if shard is not None:
            compute.from_shard(shard)
            self.done.position = Position(int(shard.meta["tick"]), int(shard.meta["lineage"]), epoch)
            self.done.zero = shard.meta["stage_zero"]

    def replay(self, records: Iterable[Record]) -> None:
        """Do again what the log says, in its order."""
        for record in records:
            self._replay(record)
        self.done.rollouts = list(self._stock.values())

    def _replay(self, record: Record) -> None:
        compute, manifest = self._compute, self._compute.manifest
        match record.kind:
            case Kind.BATCH if compute.span.is_first:
                rollouts = read_rollouts(self._stock.pop(record.microbatch), manifest.vocab)
                compute.add_batch(batch_of(rollouts, manifest.config, compute.loss_spec)[0])
            case Kind.BATCH:
                data = from_bytes(BatchData, record.payload)
                compute.add_batch(read_batch(data, manifest.config.swarm.microbatch_size, manifest.vocab))
            case Kind.BASES:
                bases = from_bytes(BasisSet, record.payload)
                compute.add_bases(bases.version, read_bases(bases, manifest, compute.span.stage))
            case Kind.CORRECTION if compute.correcting is not None:
                compute.correcting.hold(from_bytes(Correction, record.payload))
            case Kind.ROLLOUTS:
                self.keep(record)
            case Kind.COMPUTE:
                assert record.op is not None and record.stamp is not None
                carry_out(compute, record.op, record.stamp, record.microbatch, record.payload or None)
            case Kind.DECIDED:
                assert record.stamp is not None and record.decide is not None
                if record.zero is not None:
                    self.done.zero = record.zero
                    self.done.rows.append(from_bytes(Report, record.row))
                self.decided(record.stamp, record.decide)

    def decided(self, stamp: Stamp, decide: Decide) -> None:
        """A decision, applied as the first time; nothing of it goes out again."""
        self._compute.apply(stamp, decide)
        self._compute.take_capture()
        self.done.position = position = self.done.position.after(stamp, decide)
        self.done.decide = decide
        if decide.checkpoint and not self._has_shard((position.tick, position.lineage)):
            self.done.copies.append((position.tick, copy_of(self._compute, position, self.done.zero)))

    def keep(self, record: Record) -> None:
        """Rollouts that were delivered: trained on when their batch begins."""
        rollouts = from_bytes(Rollouts, record.payload)
        self._stock[rollouts.batch] = rollouts
        self.done.rollouts = list(self._stock.values())


def shard_ticks(out: Path, stage: int, stages: int) -> set[int]:
    """Ticks of this stage's shards below a run folder."""
    names = (path.parent.name for path in (out / CHECKPOINTS).glob(f"tick-*/{shard_name(stage, stages)}"))
    return {int(name.removeprefix("tick-")) for name in names if name.removeprefix("tick-").isdecimal()}


def base_of(redo: Redo, version: Version, out: Path, stage: int, stages: int) -> tuple[int, Shard | None]:
    """(tick, shard) of the nearest whole base that `version` can be rebuilt from; a damaged shard is passed over.

    Raises ShardError when there is none.
    """
    wrong: list[str] = []
    for tick, digest in redo.bases(version):
        if not digest:
            return tick, None
        try:
            return tick, read_shard(out / CHECKPOINTS / checkpoint_name(tick) / shard_name(stage, stages), digest)
        except ShardError as error:
            log.warning("an older checkpoint is taken: %s", error)
            wrong.append(str(error))
    raise ShardError(f"tick {version[0]} cannot be rebuilt: {'; '.join(wrong) or 'no base is left of it'}")


def undecided(stamp: Stamp | None) -> list[int]:
    """The lineages that either decision of a tick would lead to, if this stage has voted on one."""
    outcomes = (Outcome.COMMIT, Outcome.SKIP)
    return [Position().after(stamp, Decide(outcome)).lineage for outcome in outcomes] if stamp is not None else []
