"""The anchor as provider of corrections: takes snapshots and slices in, replays the newest pair, sends what came of it.

Replays run on one thread of their own, newest pair first; nobody waits for them. A correction is made as soon as its pair is
whole; `not_before` keeps it from being merged earlier than the latency of the run says. What arrives damaged or from
another history is refused with its reason and costs one correction. Files are replay_store.py's, order is the ring's.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anchor_node.dense_replay import Cancelled, DenseReplay
from anchor_node.replay_bases import ReplayBases
from anchor_node.replay_store import ReplayStore, SnapshotRefused
from codec.basis import Basis
from codec.corrections import CorrectionEncoder
from codec.fit import Fit
from swarm_core.learning.latency import FireSchedule
from swarm_core.learning.merge import smooth
from swarm_core.learning.replay_ring import MIB, Part, ReplayRing
from swarm_core.learning.stage import Stage
from swarm_core.manifest import Manifest
from swarm_core.models.architecture import read_shape
from swarm_core.models.reading import stage_with, tensor_shapes
from swarm_core.wire.bases import Key
from swarm_core.wire.corrections import correction_spec, digest_of, read_slice
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.frames import Header
from swarm_core.wire.messages import Correction, Slice, Snapshot, SnapshotHeld

log = logging.getLogger(__name__)
# Beside the weights of a pair: ids, log-probs and bases. Ten thousand tokens take 0.2 MB.
SLICE_BYTES = 16 * MIB
MOST_AHEAD = 1000  # ticks that a stage may be ahead of what the anchor has heard
ANY_AGE = 1 << 30
Bases = Callable[[int], Mapping[Key, Basis] | None]
Gradients = list[list[Tensor]]  # a list a stage, in the order of its parameters


@dataclass(frozen=True)
class Made:
    """What a replay gave: a correction a stage, and numbers for the books."""

    version: int
    corrections: dict[int, Correction]
    numbers: dict[str, float]
    fits: dict[Key, Fit]  # of the next bases, where some are due
    starts: list[dict[str, Tensor]]
    mean: Gradients | None


class Corrector:
    """One run's corrections. Methods are called from the event loop; `run` replays until it is cancelled.

    `send(stage, correction)` posts one; `event(name, message, numbers)` is for the books; `now()` is the newest tick known;
    `bases(version)` gives a basis version that stages may have pinned, or None where it is gone.
    """

    def __init__(
        self,
        manifest: Manifest,
        model_path: Path,
        out: Path,
        device: torch.device,
        fires: FireSchedule,
        *,
        send: Callable[[int, Correction], None],
        event: Callable[[str, str, dict[str, float]], None],
        now: Callable[[], int],
        bases: Bases,
        adopt: Callable[[int, Mapping[Key, Fit]], None] = lambda tick, fits: None,
    ) -> None:
        config, shape = manifest.config, read_shape(model_path)
        self.manifest, self._fires = manifest, fires
        shapes = [list(tensor_shapes(shape, span).values()) for span in manifest.spans]
        self._master = torch.float64 if config.run.precision == "fp64" else torch.float32
        self._store = ReplayStore(out, shapes, self._master)
        self._k_max = config.corrections.k_max
        self._ring = self._empty_ring()
        self._ring.check(pair_bytes(manifest, model_path))
        spec, seed = correction_spec(config), config.run.seed
        self._encoders = [CorrectionEncoder(spec, of, seed + i) for i, of in enumerate(shapes)]
        # What the next correction goes on from: the encoders' warm starts and the mean over dense gradients, a stage each.
        self._starts: list[dict[str, Tensor]] = [{} for _ in shapes]
        self._mean: Gradients | None = None
        self._made: dict[int, dict[int, Correction]] = {}  # kept until a newer one is due: by version, then stage
        self._decoding: set[int] = set()  # stages whose last part has come
        self._needs_bases = manifest.link().kind == "lowrank" and manifest.boundaries > 0
        self._needs_bases &= config.corrections.merger == "held_delta"
        self._model_path = model_path
        self._device = device
        self._send, self._event, self._now, self._bases, self._adopt = send, event, now, bases, adopt
        self.refresh: ReplayBases | None = None  # what makes bases of the replays; set before the first one
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="replay")
        self._wake = asyncio.Event()
        self._stopped = threading.Event()

    def _empty_ring(self) -> ReplayRing:
        return ReplayRing(self._fires, self.manifest.stages, self.manifest.config.anchor.ring_mb * MIB)

    @property
    def _oldest(self) -> int:
        """The age up to which a replay is of use: bases do not mind it, so with `refresh` there is none too old."""
        return self._k_max if self.refresh is None else ANY_AGE

    # The volume --------------------------------------------------------------------------------------------------------

    def take_up(self, tick: int | None) -> None:
        """Go on from the volume. `tick`: the run starts again there, and what was taken in it or later is of a history
        that is no more; None: the run is where it was."""
        if tick is not None:
            self._forget_since(tick)
        self._ring, self._made = self._empty_ring(), self._store.made()
        for (version, _, _), parts in self._store.pairs().items():
            for part, size in parts.items():
                self._drop(self._ring.part_came(version, part, size))
            if version in self._made and self._ring.complete(version):
                self._ring.replayed(version)
        self._starts, self._mean = self._read_state(self._store.state())
        self._wake.set()

    def _forget_since(self, tick: int) -> None:
        for version, taken, _ in self._store.pairs():
            if taken >= tick:
                self._store.drop(version)
        for version, corrections in self._store.made().items():
            if any(c.tick >= tick for c in corrections.values()):
                self._store.drop_made(version)
        for stage in range(self.manifest.stages):
            if self._store.base(stage)[1] >= tick:
                self._store.drop_base(stage)

    def pending(self, stage: int) -> list[Correction]:
        """The corrections of a stage that may still be merged, for a member that starts or comes back."""
        kept = [corrections[stage] for _, corrections in sorted(self._made.items()) if stage in corrections]
        return [c for c in kept if self._now() - c.tick <= self._k_max]

    # What stages send --------------------------------------------------------------------------------------------------

    async def take_snapshot(self, stage: int, header: Header, epoch: int, message: Snapshot) -> SnapshotHeld:
        """A part of a stage's weights; the answer for that stage. Whatever goes wrong costs one correction, no run."""
        identity = (message.version, message.tick, message.lineage)
        try:
            self._check(header, epoch, message.version, message.tick)
            if identity == self._store.base(stage):
                return SnapshotHeld(message.version, message.total_bytes, whole=True)  # the last answer was lost
            if stage in self._decoding:  # a part said again: its answer is on the way
                return SnapshotHeld(message.version, message.total_bytes)
            held = self._store.part(stage, message)
            if held < message.total_bytes:
                return SnapshotHeld(message.version, held)
            self._decoding.add(stage)
            try:
                decoded = await asyncio.to_thread(self._store.decode, stage)
            finally:
                self._decoding.discard(stage)
            if self._store.others(decoded):
                self._drop([message.version])
            self._came(message.version, stage, self._store.place(stage, decoded))
        except Exception as error:  # noqa: BLE001 - logged and told there
            return SnapshotHeld(message.version, refused=self._refused(f"stage {stage}, snapshot", message, error))
        return SnapshotHeld(message.version, message.total_bytes, whole=True)

    def take_slice(self, stage: int, header: Header, epoch: int, message: Slice) -> None:
        """What a snapshot's tick consumed, from the first or the last stage. Whatever goes wrong costs one correction."""
        identity = (message.version, message.tick, message.lineage)
        try:
            self._check(header, epoch, message.version, message.tick)
            if message.prompt_ids and stage != 0 or message.scored and stage != self.manifest.stages - 1:
                raise SnapshotRefused(f"stage {stage} has no such part of it")
            bases = None
            if message.prompt_ids:
                read_slice(message, Slice(), self.manifest.config.swarm.microbatch_size, self.manifest.vocab)
                bases = self._bases(message.basis_version)
                if bases is None and self._needs_bases:
                    version = message.basis_version
                    raise SnapshotRefused(f"basis version {version}, which its batch is pinned to, is gone")
            if self._store.others(identity):
                self._drop([message.version])
            for part, size in self._store.keep_slice(message, bases).items():
                self._came(message.version, part, size)
        except Exception as error:  # noqa: BLE001 - logged and told there
            self._refused(f"stage {stage}, slice", message, error)

    def _refused(self, what: str, message: Snapshot | Slice, error: Exception) -> str:
        """Say why something is not kept. What nobody foresaw, a full disk or a bug, is ours, and no reason to end a run."""
        text = str(error)
        if not isinstance(error, (SnapshotRefused, BadFrame)):
            log.error("%s %d", what, message.version, exc_info=error)
            text = f"{type(error).__name__}: {error}"
        self._event("snapshot_refused", f"{what} {message.version}: {text}", {})
        return text

    def _check(self, header: Header, epoch: int, version: int, tick: int) -> None:
        if header.epoch != epoch:
            raise SnapshotRefused(f"it is of epoch {header.epoch}, this run is in {epoch}")
        if version < 1 or version != self._fires.count_before(tick + 1):
            raise SnapshotRefused(f"tick {tick} is none that snapshot {version} could be taken in")
        if tick > self._now() + MOST_AHEAD:
            raise SnapshotRefused(f"tick {tick}; the run is at {self._now()}")

    def _came(self, version: int, part: Part, size: int) -> None:
        self._drop(self._ring.part_came(version, part, size))
        self._prune()
        self._wake.set()

    def _drop(self, versions: list[int]) -> None:
        for version in versions:
            self._ring.forget(version)
            self._store.drop(version)

    def _prune(self) -> None:
        """What has had its time goes: pairs by the ring's rules, corrections once a newer one is due or they are too old."""
        gone = self._ring.drop(self._now(), self._oldest)
        if unmade := [version for version in gone if version not in self._made]:
            self._event(
                "snapshots_passed_over", f"{', '.join(map(str, unmade))}: too old, or overtaken by newer ones", {}
            )
        self._drop(gone)
        due = max((v for v, of in self._made.items() if of[0].not_before <= self._now()), default=0)
        newest = max(self._made, default=0)  # keeps what the next one goes on from
        for version in [v for v, of in self._made.items() if v < due or self._now() - of[0].tick > self._k_max]:
            if version != newest:
                del self._made[version]
                self._store.drop_made(version)

    # Replays -----------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Replay the newest pair whenever there is one, until cancelled. A replay that fails costs one correction."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                version = self._ring.next_replay(self._now(), self._oldest)
                if version is None:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                self._ring.start(version)
                try:
                    made = await loop.run_in_executor(self._thread, self._make, version)
                    if self._ring.replaying == version:  # else the run went back meanwhile, and its pair is gone
                        self._deliver(made)
                        self._ring.replayed(version)
                except Cancelled:
                    return
                except Exception as error:  # memory, a full disk, a bug: training goes on without this one
                    log.exception("replay of snapshot %d", version)
                    self._event("replay_failed", f"snapshot {version}: {type(error).__name__}: {error}", {})
                    if self._ring.replaying == version:
                        self._drop([version])
                self._prune()
        finally:
            self._stopped.set()
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _deliver(self, made: Made) -> None:
        one, size = made.corrections[0], sum(len(c.packet) for c in made.corrections.values())
        if made.version > max(self._made, default=0):  # an older pair replayed late moves nothing
            self._starts, self._mean = made.starts, made.mean
            state = self._state()
        else:
            state = {}
        self._store.keep_made(made.version, made.corrections, state)
        self._made[made.version] = made.corrections
        if self._now() - one.tick <= self._k_max:
            for stage, correction in made.corrections.items():
                self._send(stage, correction)
        if made.fits:
            self._adopt(one.tick, made.fits)
        text = f"{made.version}, of tick {one.tick}, made by tick {one.born} in {made.numbers['correction/replay_s']:.1f} s"
        text += f", {size / 1e3:.1f} kB"
        about = {"made": made.version, "snapshot_tick": one.tick, "born": one.born, "not_before": one.not_before}
        numbers = {f"correction/{name}": float(value) for name, value in about.items()}
        self._event("correction", text, numbers | made.numbers | {"correction/bytes": float(size)})

    def _make(self, version: int) -> Made:
        """On the replay thread: from a pair to a correction a stage. What it goes on from is put aside, not replaced."""
        started = time.monotonic()
        first, last = self._store.slice(version)
        batch = read_slice(first, last, self.manifest.config.swarm.microbatch_size, self.manifest.vocab)
        replay = DenseReplay(self.manifest, lambda i: self._stage(version, i), self._device)
        tensors = replay.needed(
            batch,
            self._store.bases(version),
            tick=first.tick,
            watch=self.refresh and self.refresh.watch,
            cancelled=self._stopped.is_set,
        )
        mean, tensors = self._smoothed(tensors)
        taken_s = time.monotonic() - started
        if self._stopped.wait((self.manifest.config.anchor.slowdown - 1.0) * taken_s):
            raise Cancelled
        born, first_use = max(first.tick, self._now()), self._fires.not_before(version, first.tick)
        about = version, first.tick, born, first_use, first.lineage
        corrections: dict[int, Correction] = {}
        starts = []
        for stage, (encoder, parts) in enumerate(zip(self._encoders, tensors, strict=True)):
            if self._stopped.is_set():
                raise Cancelled
            encoder.load(self._starts[stage])
            packet = encoder.encode(parts)
            starts.append({name: t.clone() for name, t in encoder.state().items()})
            corrections[stage] = Correction(*about, packet, digest_of(packet))
        fits = self.refresh.solve(first.tick) if self.refresh is not None else {}
        return Made(version, corrections, {"correction/replay_s": time.monotonic() - started}, fits, starts, mean)

    def _stage(self, version: int, stage: int) -> Stage:
        weights = self._store.weights(version, stage)
        return stage_with(self._model_path, self.manifest.spans[stage], weights, self._master)

    def _smoothed(self, tensors: Gradients) -> tuple[Gradients | None, Gradients]:
        """(the running mean, what corrections are made of)."""
        beta = self.manifest.config.corrections.beta_anc
        if not beta:
            return None, tensors
        means = self._mean or [None] * len(tensors)
        mean = [smooth(old, new, beta) for old, new in zip(means, tensors, strict=True)]
        return mean, mean

    def _state(self) -> dict[str, Tensor]:
        state = {f"encoder.{i}.{name}": t for i, start in enumerate(self._starts) for name, t in start.items()}
        for stage, means in enumerate(self._mean or []):
            state |= {f"mean.{stage}.{i:06d}": t for i, t in enumerate(means)}
        return state

    def _read_state(self, state: dict[str, Tensor]) -> tuple[list[dict[str, Tensor]], Gradients | None]:
        stages = range(self.manifest.stages)
        starts = [{n.split(".", 2)[2]: t for n, t in state.items() if n.startswith(f"encoder.{i}.")} for i in stages]
        means = [[state[n] for n in sorted(state) if n.startswith(f"mean.{i}.")] for i in stages]
        return starts, means if all(means) else None


def pair_bytes(manifest: Manifest, model_path: Path) -> int:
    """What one pair takes on the anchor's disk: all weights, whole, and room for a slice."""
    each = 8 if manifest.config.run.precision == "fp64" else 4
    shape = read_shape(model_path)
    numbers = sum(torch.Size(dims).numel() for span in manifest.spans for dims in tensor_shapes(shape, span).values())
    return each * numbers + SLICE_BYTES
