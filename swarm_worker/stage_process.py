"""The process of one stage worker: join, load, wait for the start, meet the neighbours, work, leave. The shell's shell."""

from __future__ import annotations

import asyncio
import logging
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from codec.basis import Basis
from codec.spec import Direction
from swarm_core.errors import UserError
from swarm_core.models.architecture import fingerprint, read_shape, resolve
from swarm_core.run_folder import CHECKPOINTS, JOURNAL_FILE, RECORD_FILE, make_folder
from swarm_core.wire.errors import Refused
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.health import Health
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import (
    BasisSet,
    FrameKind,
    Hello,
    Ready,
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
from swarm_worker.compute import StageCompute
from swarm_worker.compute_thread import ComputeThread
from swarm_worker.device import pick_device
from swarm_worker.headers import Position
from swarm_worker.journal import Journal
from swarm_worker.lead import LeadState
from swarm_worker.membership import Membership, await_start, join, read_bases, tell_failure
from swarm_worker.sampler.replay import ReplayWriter, cut_record
from swarm_worker.service import StageService
from swarm_worker.shard import Shard, ShardError, ShardWriter, read_shard, shard_name
from swarm_worker.stage_zero import StageZero
from swarm_worker.vitals import watch_member, watch_stage
from swarm_worker.worker import StageWorker

log = logging.getLogger(__name__)
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
    health_port: int | None = None


async def hold_stage(arguments: StageArguments, *, signals: bool = True) -> None:
    """`swarm_worker join`. Built inside the running loop, which gRPC's asyncio server binds to.

    `signals` False leaves SIGINT and SIGTERM alone, for several workers in one process.
    """
    if arguments.stage < 0:
        raise UserError(f"stage {arguments.stage} does not exist: stages are counted from 0")
    await StageProcess(arguments, signals).run()


class StageProcess:
    """Everything from the command line to the exit of one stage worker."""

    def __init__(self, arguments: StageArguments, signals: bool) -> None:
        self.arguments = arguments
        self._signals = signals
        self.ledger = Ledger()
        self.worker: StageWorker | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self.service = StageService(arguments.stage, self.ledger, self._serve_above, self._take_rollouts)
        self.limits = self.service.server.limits = read_limits(arguments.limit_mbps)
        self.health = Health()

    async def run(self) -> None:
        """Join, work until the run ends, leave. Raises typed errors with one readable line."""
        a = self.arguments
        membership, below = None, None
        try:
            make_folder(a.out)
            address = await self.service.server.start(a.listen)
            await self.health.start(a.health_port, a.listen)
            hello = Hello(role="stage", stage=a.stage, address=a.advertise or dialable(address))
            hello.manifest_digest = a.expect_digest
            membership = await join(a.anchor, "Anchor/Attend", hello, self.ledger, a.wait_s, f"anchor-stage{a.stage}")
            membership.anchor.pace(self.limits)
            watch_member(self.health, membership.way.pulse)
            compute = await self._load(membership)
            start = await await_start(membership, lambda m: compute.add_bases(m.version, self._bases(membership, m)))
            if start is None:
                return
            below = await self._dial_below(membership, start)
            self.worker = await self._assemble(membership, compute, start, below)
            watch_stage(self.health, self.worker)
            if self._signals:
                self._on_signals(self.worker)
            if below is not None:
                below.heart.start(membership.way.pulse, until=self.worker.over)
            self.service.open(membership.digest)
            log.info("the run is over: %s", await self.worker.run())
        except Exception as error:
            if membership is not None and self.worker is None:  # a worker has said so itself
                await tell_failure(membership, f"stage {a.stage}", error)
            raise
        finally:
            for stream in (below, membership.anchor if membership is not None else None):
                if stream is not None:
                    await stream.close()
            await self.service.server.stop()
            await self.health.stop()
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _bases(self, membership: Membership, message: BasisSet) -> dict[tuple[int, Direction], Basis]:
        return read_bases(message, membership.manifest, self.arguments.stage)

    async def _load(self, membership: Membership) -> StageCompute:
        config = membership.manifest.config
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        path = resolve(self.arguments.model or config.model.path)
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._thread, fingerprint, path)
        device = pick_device(config.run.device)
        compute = await loop.run_in_executor(
            self._thread, StageCompute, membership.manifest, self.arguments.stage, path, device
        )
        if compute.correcting is not None:
            membership.expect_corrections(compute.correcting.largest_packet)
        parameters = sum(p.numel() for p in compute.parameters)
        log.info(
            "stage %d of %d: layers %d to %d, %.2f M parameters on %s",
            compute.span.stage,
            compute.span.stages,
            compute.span.first_layer,
            compute.span.last_layer - 1,
            parameters / 1e6,
            device,
        )
        if compute.span.is_last and read_shape(path).tied:
            log.info("lm_head was tied to the embedding: this stage trains a copy of its own, and the export says so")
        size = sum(p.numel() * p.element_size() for p in compute.parameters)
        ready = Ready(parameters, size, found)
        await membership.anchor.send(Frame(Header(FrameKind.READY, membership.run), to_bytes(ready)))
        return compute

    async def _dial_below(self, membership: Membership, start: Start) -> Dialled | None:
        """The link to the next stage. It answers once its own link is up, so the chain closes from the last stage on."""
        stage = self.arguments.stage
        if stage + 1 == membership.manifest.stages:
            return None
        address = start.stage_addresses[stage + 1]
        below = await dial(address, "Stage/Link", self.ledger, f"stage {stage + 1}", NEIGHBOUR_WAIT_S)
        below.name(f"stage{stage}-stage{stage + 1}", "down").pace(self.limits)
        hello = Hello(role="link", stage=stage, manifest_digest=membership.digest)
        await below.send(Frame(Header(FrameKind.HELLO, membership.run), to_bytes(hello)))
        from_bytes(Welcome, (await below.expect(FrameKind.WELCOME)).payload)
        return below

    async def _assemble(
        self, membership: Membership, compute: StageCompute, start: Start, below: Dialled | None
    ) -> StageWorker:
        a = self.arguments
        state, position, saved = LeadState(epoch=start.epoch), Position(epoch=start.epoch), None
        stats: dict[int, dict[str, float]] = {}
        if start.checkpoint:
            loop = asyncio.get_running_loop()
            shard = await loop.run_in_executor(self._thread, self._read_shard, membership, start)
            await loop.run_in_executor(self._thread, compute.from_shard, shard)
            position = Position(int(shard.meta["tick"]), int(shard.meta["lineage"]), start.epoch)
            if a.stage == 0:
                state = LeadState.from_json(shard.meta["stage_zero"]["lead"])
                stats = {int(batch): values for batch, values in shard.meta["stage_zero"]["stats"].items()}
                state.epoch, state.published = start.epoch, position.tick
            file = shard_name(a.stage, membership.manifest.stages)
            saved = Saved(position.tick, start.checkpoint, file, start.shard_digests[a.stage])
            compute.publish(position.tick)
            self.service.offer(position.tick, compute.published[position.tick])
            log.info("continuing at tick %d from %s", position.tick, start.checkpoint)
        zero = None
        if a.stage == 0:
            zero = self._stage_zero(membership, compute, state, stats, resumed=bool(start.checkpoint))
        keep = membership.manifest.config.checkpoint.keep
        shards = ShardWriter(a.out, a.stage, membership.manifest.stages, membership.digest, saved, keep)
        work = ComputeThread(compute, self._thread, shards, position)
        return StageWorker(membership, work, self.service, below, zero)

    def _stage_zero(
        self,
        membership: Membership,
        compute: StageCompute,
        state: LeadState,
        stats: dict[int, dict[str, float]],
        *,
        resumed: bool,
    ) -> StageZero:
        path = self.arguments.out / JOURNAL_FILE
        if not resumed and path.exists() and path.read_text().strip():
            raise UserError(f"{path} belongs to an earlier run: give this worker another --out, or resume that run")
        journal = Journal(path, state.tick)
        record = self._open_record(membership, state.next_batch)
        return StageZero(membership.manifest, compute.loss_spec, compute.dtype, journal, state, record, stats)

    def _open_record(self, membership: Membership, next_batch: int) -> ReplayWriter | None:
        config = membership.manifest.config
        if not config.sampler.record:
            return None
        path = self.arguments.out / RECORD_FILE
        cut_record(path, next_batch)  # batches after the checkpoint will be drawn again
        return ReplayWriter(path, config.grpo.completions_per_prompt, config.grpo.prompts_per_batch)

    def _read_shard(self, membership: Membership, start: Start) -> Shard:
        a = self.arguments
        name = shard_name(a.stage, membership.manifest.stages)
        path = a.out / CHECKPOINTS / start.checkpoint / name
        shard = read_shard(path, start.shard_digests.get(a.stage, ""))
        if shard.meta.get("manifest_digest") != membership.digest:
            raise ShardError(
                f"{path} was written under manifest {str(shard.meta.get('manifest_digest'))[:12]}..., the anchor runs "
                f"{membership.digest[:12]}...: resume with the run file of that run"
            )
        return shard

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

    def _on_signals(self, worker: StageWorker) -> None:
        """SIGTERM or SIGINT: ask for the end of the run after this tick; a second one ends this process at once."""
        asked = False

        def leave(name: str) -> None:
            nonlocal asked
            if asked:
                worker.fail(KeyboardInterrupt(name))
                return
            asked = True
            log.warning("%s: leaving after this tick, with a checkpoint; once more to leave at once", name)
            stop = Stop(reason=f"stage {self.arguments.stage} got {name}")
            worker.anchor.post(Frame(Header(FrameKind.STOP), to_bytes(stop)))
            worker.stop(stop)  # stage 0 needs no anchor for it

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, leave, number.name)
