"""What a stage holds from one epoch to the next: its tensors, its log and its shards; what it can go back to, and going there.

Everything that touches tensors runs on the compute thread, so that nothing is done while a command is under way. No stream
is known here.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from swarm_core.errors import UserError
from swarm_core.models.architecture import fingerprint, read_shape, resolve
from swarm_core.run_folder import CHECKPOINTS, JOURNAL_FILE, RECORD_FILE
from swarm_core.wire.messages import (
    Check,
    Checked,
    Copies,
    Decide,
    Held,
    Ready,
    Report,
    Saved,
    Start,
    from_bytes,
    to_bytes,
)
from swarm_worker.compute import StageCompute
from swarm_worker.compute_thread import ComputeThread
from swarm_worker.device import pick_device
from swarm_worker.journal import Journal
from swarm_worker.lead import LeadState
from swarm_worker.membership import Membership, read_bases
from swarm_worker.recovery import Rebuilding, Rebuilt, base_of, shard_ticks, undecided
from swarm_worker.redo import Kind, Record, Redo
from swarm_worker.sampler.replay import ReplayWriter, cut_record
from swarm_worker.saving import Saving
from swarm_worker.shard import Shard, ShardError, ShardWriter, check_shard, read_shard, shard_name
from swarm_worker.stage_zero import StageZero

log = logging.getLogger(__name__)


class Epochs:
    """One stage's, in one process."""

    def __init__(
        self, membership: Membership, stage: int, out: Path, model: str | None, thread: ThreadPoolExecutor
    ) -> None:
        self._membership, self._manifest = membership, membership.manifest
        self._stage, self._out, self._thread = stage, out, thread
        config = self._manifest.config
        self._path = resolve(model or config.model.path)
        self._device = pick_device(config.run.device)
        self._compute: StageCompute | None = None
        self._work: ComputeThread | None = None
        self.redo = Redo(out, stage, self._manifest.stages, membership.digest)
        self._worked = False
        self.rows: list[Report] = []  # of ticks that the anchor may not have in its books
        saved = config.checkpoint
        shards = ShardWriter(out, stage, self._manifest.stages, membership.digest, saved.keep, hf=saved.hf)
        self.saving = Saving(shards, self.redo, thread)
        self.saved: list[Saved] = []  # shards that the anchor may not have heard of

    async def find(self) -> Copies:
        """Read the log that lies here; which start of the run it is of (0: there is none), and how far it reaches."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self.redo.find)
        extents = self.redo.extents
        if not extents.files:
            return Copies()
        return Copies(self.redo.start_id, epoch=extents.epoch, tick=extents.files[-1].tick)

    async def load(self) -> Ready:
        """The layers of this stage, from the model's files."""
        config = self._manifest.config
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._thread, fingerprint, self._path)
        compute = self._compute = await loop.run_in_executor(self._thread, self._fresh)
        if compute.correcting is not None:
            self._membership.expect_corrections(compute.correcting.largest_packet)
        parameters = sum(p.numel() for p in compute.parameters)
        span = compute.span
        where = f"stage {span.stage} of {span.stages}: layers {span.first_layer} to {span.last_layer - 1}"
        log.info("%s, %.2f M parameters on %s", where, parameters / 1e6, self._device)
        if span.is_last and read_shape(self._path).tied:
            log.info("lm_head was tied to the embedding: this stage trains a copy of its own, and the export says so")
        size = sum(p.numel() * p.element_size() for p in compute.parameters)
        return Ready(parameters, size, found)

    def _fresh(self) -> StageCompute:
        return StageCompute(self._manifest, self._stage, self._path, self._device)

    def standing(self) -> tuple[int, int]:
        """(tick, newest basis version), as far as this stage has come."""
        if self._work is None:
            return 0, 0
        return self._work.position.tick, self._work.compute.newest_basis

    # What can be gone back to ------------------------------------------------------------------------------------------

    def held(self, epoch: int) -> Held:
        """The answer to a FENCE. Runs on the compute thread: whatever it was at is done by then."""
        redo, stages = self.redo, self._manifest.stages
        redo.sync()
        versions = redo.versions(shard_ticks(self._out, self._stage, stages))
        held = Held(epoch, redo.start_id, [tick for tick, _ in versions], [lineage for _, lineage in versions])
        if self._stage == 0:
            held.decided = redo.decided or Decide()
        else:
            held.pending = undecided(redo.voted)
        return held

    async def check(self, check: Check) -> Checked:
        """Whether this stage's shard of a checkpoint is whole. To read a large one takes a while: on the compute thread."""
        path = self._out / CHECKPOINTS / Path(check.checkpoint).name / shard_name(self._stage, self._manifest.stages)
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, check_shard, path, check.digest)
        except ShardError as error:
            log.warning("%s", error)
            return Checked(check.checkpoint, str(error))
        return Checked(check.checkpoint)

    def take_rows(self) -> list[Report]:
        """Rows that are to be reported, once, however many epochs were cut off before."""
        rows, self.rows = self.rows, []
        return rows

    # Where an epoch begins ---------------------------------------------------------------------------------------------

    async def set_up(self, start: Start) -> tuple[ComputeThread, StageZero | None]:
        """Bring everything to where the anchor wants it. Raises ShardError, UserError."""
        await self.saving.idle()
        on_thread = self._recover if start.recovery else self._begin
        built = await asyncio.get_running_loop().run_in_executor(self._thread, on_thread, start)
        compute = self._compute = built.compute
        compute.publish(built.position.tick)
        if not self._worked:  # else they are in its reports, which are kept until they are in the books
            self.rows = [row for row in built.rows if row.tick >= start.reported_tick]
        self._worked = True
        self._work = ComputeThread(compute, self._thread, self.saving, built.position, self.redo)
        for tick, copy in built.copies:
            await self.saving.room(tick)
            self.saving.begin(tick, copy)
        zero = self._stage_zero(start, built) if self._stage == 0 else None
        log.info("epoch %d begins at tick %d", start.epoch, built.position.tick)
        return self._work, zero

    def _begin(self, start: Start) -> Rebuilt:
        """A run begins, from the model's files or from a checkpoint."""
        compute, self.saved = self._compute or self._fresh(), []
        shard, digest = None, ""
        if start.checkpoint:
            digest = start.shard_digests.get(self._stage, "")
            shard = self._read_shard(start.checkpoint, digest)
        built = Rebuilding(compute, shard, start.epoch, self.redo.has_shard).done
        if shard is not None:
            tick, file = built.position.tick, shard_name(self._stage, self._manifest.stages)
            self.saved = [Saved(tick, start.checkpoint, file, digest)]
            log.info("continuing at tick %d from %s", tick, start.checkpoint)
        self.redo.begin(start.start_id, (built.position.tick, built.position.lineage), digest)
        self._take_newest_bases(compute)
        return built

    def _recover(self, start: Start) -> Rebuilt:
        """An epoch begins at a version that all stages hold."""
        version, stages = (start.tick, start.lineage), self._manifest.stages
        base, shard = base_of(self.redo, version, self._out, self._stage, stages)
        compute = self._compute if self._work is None else None
        self._compute = self._work = None  # a second set of weights and moments may not fit
        attempt = Rebuilding(compute or self._fresh(), shard, start.epoch, self.redo.has_shard)
        attempt.replay(self.redo.records(base, version))
        voted, built = self.redo.voted, attempt.done
        if (
            self._stage == 0 and start.reported_tick < base
        ):  # the anchor may have been away for longer than a checkpoint
            built.rows = [from_bytes(Report, r.row) for r in self.redo.records(0, version) if r.row]
        left = self.redo.cut(version)
        if built.position.tick < start.tick and voted is not None:  # it has voted, and hears the decision only now
            self.redo.append(Record(Kind.DECIDED, stamp=voted, decide=start.decide))
            attempt.decided(voted, start.decide)
        if (built.position.tick, built.position.lineage) != version:
            raise ShardError(
                f"stage {self._stage} reached tick {built.position.tick} of history {built.position.lineage:016x}, wanted tick "
                f"{start.tick} of {start.lineage:016x}: its redo log is damaged; start it with an empty --out"
            )
        if built.copies and built.copies[-1][0] == start.tick:
            self.redo.turn(version)  # where the last process has died before
        for record in left:
            attempt.keep(record)
        for rollouts in built.rollouts:
            self.redo.append(Record(Kind.ROLLOUTS, to_bytes(rollouts), microbatch=rollouts.batch))
        self._take_newest_bases(built.compute)
        self.redo.sync()
        kept = self.redo.bases(version)[: self.saving.shards.keep or None]
        said = [self.saving.shards.said_again(tick, digest) for tick, digest in reversed(kept) if digest]
        self.saved = [saved for saved in said if saved is not None]
        log.info("tick %d is rebuilt from tick %d", start.tick, base)
        return built

    def _take_newest_bases(self, compute: StageCompute) -> None:
        """Those that the anchor sent before the start, or while there was no epoch."""
        newest = self._membership.last_bases
        if newest is not None:
            compute.add_bases(newest.version, read_bases(newest, self._manifest, self._stage))
            self.redo.append(Record(Kind.BASES, to_bytes(newest)))

    def _read_shard(self, checkpoint: str, digest: str) -> Shard:
        path = self._out / CHECKPOINTS / checkpoint / shard_name(self._stage, self._manifest.stages)
        shard = read_shard(path, digest)
        if shard.meta.get("manifest_digest") != self._membership.digest:
            raise ShardError(
                f"{path} was written under manifest {str(shard.meta.get('manifest_digest'))[:12]}..., the anchor runs "
                f"{self._membership.digest[:12]}...: resume with the run file of that run"
            )
        return shard

    def _stage_zero(self, start: Start, built: Rebuilt) -> StageZero:
        manifest, compute = self._manifest, built.compute
        state, stats = LeadState(), {}
        if built.zero is not None:
            state = LeadState.from_json(built.zero["lead"])
            stats = {int(batch): values for batch, values in built.zero["stats"].items()}
            state.published = built.position.tick
        state.epoch = start.epoch
        path = self._out / JOURNAL_FILE
        begins = not (start.recovery or start.checkpoint)
        if begins and path.exists() and path.read_text().strip():
            raise UserError(f"{path} belongs to an earlier run: give this worker another --out, or resume that run")
        journal, record = Journal(path, state.tick), None
        config = manifest.config
        if config.sampler.record:
            cut_record(self._out / RECORD_FILE, state.next_batch)  # later ones will be drawn, or begun, again
            sizes = config.grpo.completions_per_prompt, config.grpo.prompts_per_batch
            record = ReplayWriter(self._out / RECORD_FILE, *sizes)
        zero = StageZero(manifest, compute.loss_spec, compute.dtype, journal, state, record, stats)
        zero.kept = {rollouts.batch: rollouts for rollouts in built.rollouts if rollouts.batch >= state.next_batch}
        return zero


def span_of(held: Held) -> str:
    """What is held, in words."""
    if not held.ticks:
        return "nothing of this run"
    behind = ", and has voted on the next one" if held.pending else ""
    return f"ticks {held.ticks[0]} to {held.ticks[-1]}{behind}"
