"""A stage's numerics as hash chains, and the judge of what a swarm does with them. No stream, no clock.

The weights are a hash of everything that was ever applied, so half a tick, a tick twice, another basis or another order all
give other weights; nothing here is ever equal by chance. The judge keeps books of its own over all processes and epochs.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from codec.errors import ReferenceMismatch
from swarm_core.learning.batch import Batch
from swarm_core.learning.grpo import LossSpec
from swarm_core.manifest import Manifest
from swarm_core.run_folder import MOST_LOST
from swarm_core.wire.messages import BatchData, Decide, Mode, Outcome, from_bytes, to_bytes
from swarm_core.wire.rollouts import batch_data, read_batch
from swarm_worker.compute import Tally
from swarm_worker.headers import Position
from swarm_worker.link_ends import Packet
from swarm_worker.schedule import Stamp
from swarm_worker.shard import Shard

Version = tuple[int, int]


def chain(*parts: Any) -> str:
    """A short hash of anything that prints the same when it is the same."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


class Objection(AssertionError):
    """A correct swarm never does this."""


@dataclass
class Judge:
    """What has been seen, by all processes of a run together."""

    seed: int
    trouble: str = ""  # the first objection
    happened: dict[str, int] = field(default_factory=dict)
    parents: dict[Version, Version] = field(default_factory=dict)  # of what was decided durably
    decisions: dict[Version, tuple[Stamp, Decide]] = field(default_factory=dict)
    published: Version | None = None  # the newest that was told to anybody
    weights: dict[tuple[int, str], str] = field(default_factory=dict)  # (stage, history) -> weights
    histories: dict[Version, str] = field(default_factory=dict)
    lines: dict[tuple[int, int], int] = field(default_factory=dict)  # (epoch, tick) -> lineage
    worked: dict[tuple[int, int], object] = field(default_factory=dict)  # (stage, epoch) -> who
    bases: dict[int, str] = field(default_factory=dict)
    lost_hosts: int = 0  # of which nobody has gone back yet

    def object(self, what: str, cause: BaseException | None = None) -> None:
        """Note it, and stop whoever did it."""
        self.trouble = self.trouble or what
        raise Objection(what) from cause

    def note(self, what: str, count: int = 1) -> None:
        self.happened[what] = self.happened.get(what, 0) + count

    def decides(self, stamp: Stamp, decide: Decide) -> None:
        """Stage 0 has a decision in its journal."""
        after = Position().after(stamp, decide)
        before = (stamp.tick, stamp.lineage)
        if self.parents.setdefault((after.tick, after.lineage), before) != before:
            self.object(f"tick {stamp.tick} is decided on another history under the same name")
        self.decisions[after.tick, after.lineage] = stamp, decide

    def tells(self, stamp: Stamp, decide: Decide) -> None:
        """Stage 0 tells others."""
        if decide.outcome != Outcome.HOLD:
            after = Position().after(stamp, decide)
            if not self._contains_published((stamp.tick, stamp.lineage)):
                self.object(f"tick {stamp.tick} is told beside tick {self.published}")
            self.published = after.tick, after.lineage

    def starts(self, epoch: int, version: Version) -> None:
        """The anchor names where an epoch begins. A host that was lost excuses that the run goes back with its copy, once."""
        if self.published is not None and not self._contains_published(version):
            lost = self.published[0] - version[0]
            if not self.lost_hosts or lost > MOST_LOST:
                self.object(
                    f"epoch {epoch} begins at tick {version[0]}, and tick {self.published[0] - 1} is lost, though it was told"
                )
            self.lost_hosts -= 1
            self.note("went back")
        self.published = version  # which everybody is told

    def _contains_published(self, version: Version) -> bool:
        at: Version | None = version
        while at is not None and at != self.published:
            at = self.parents.get(at)
        return self.published is None or at is not None

    def works(self, stage: int, epoch: int, who: object) -> None:
        if self.worked.setdefault((stage, epoch), who) is not who:
            self.object(f"stage {stage} works in epoch {epoch} for a second time")

    def applies(self, compute: PretendCompute, stamp: Stamp, decide: Decide) -> None:
        """A stage has stepped, or skipped."""
        stage, after = compute.span.stage, Position().after(stamp, decide)
        version = after.tick, after.lineage
        if version not in self.parents:
            self.object(f"stage {stage} applies tick {stamp.tick}, which stage 0 has not decided so")
        if self.histories.setdefault(version, compute.history) != compute.history:
            self.object(f"stage {stage} has another history at tick {after.tick}")
        if self.weights.setdefault((stage, compute.history), compute.weights) != compute.weights:
            self.object(f"stage {stage} has other weights at tick {after.tick} than it, or another process, had there")
        if self.lines.setdefault((stamp.epoch, after.tick), after.lineage) != after.lineage:
            self.object(f"two histories of tick {stamp.tick} in epoch {stamp.epoch}")


class PretendCompute:
    """What ComputeThread and Rebuilding ask of a StageCompute."""

    def __init__(self, manifest: Manifest, stage: int, judge: Judge, world: World) -> None:
        self.manifest, self.span, self.judge, self.world = manifest, manifest.spans[stage], judge, world
        self.parameters: list[Any] = []
        self.loss_spec, self.dtype, self.correcting = LossSpec(), torch.float32, None
        self.batches: dict[int, Batch] = {}
        self.bases: dict[int, str] = {0: "basis 0"}
        self.published: dict[int, dict[str, Any]] = {}
        self.tick, self.weights, self.history = 0, chain("initial", stage), "the beginning"
        self._gathered: list[str] = []
        self._tallied: Stamp | None = None
        self._live: dict[int, str] = {}
        self._old: dict[str, str] = {}  # by place in the batch: what the score pass found
        # Of rows sent and received in earlier passes, by place and direction; staged while a tick runs.
        self._references: dict[str, str] = {}
        self._staged: dict[str, str] = {}

    @property
    def newest_basis(self) -> int:
        return max(self.bases)

    def add_batch(self, batch: Batch) -> None:
        self.batches[batch.number] = batch

    def add_bases(self, version: int, bases: str) -> None:
        if self.judge.bases.setdefault(version, bases) != bases:
            self.judge.object(f"two bases are called version {version}")
        self.bases[version] = bases

    # Packets -----------------------------------------------------------------------------------------------------------

    def _place(self, stamp: Stamp, microbatch: int) -> str:
        if stamp.mode is Mode.PROBE:
            return f"{stamp.batch}/{stamp.slice}/0"
        if stamp.mode is Mode.TRAIN:
            return f"{stamp.batch}/{stamp.slice}/{microbatch}"
        slice_, index = self.batches[stamp.batch].place(microbatch)
        return f"{stamp.batch}/{slice_}/{index}"

    def _packet(self, stamp: Stamp, place: str, value: str, *, whole: bool = False) -> Packet:
        refers = self._references.get(f"sent {place}", "") if stamp.mode is Mode.TRAIN and not whole else ""
        if stamp.mode is Mode.TRAIN:
            self._staged[f"sent {place}"] = value
        said = {"basis": self.bases[stamp.basis_version], "place": place, "refers": refers, "value": value}
        return Packet(json.dumps(said | {"version": [stamp.tick, stamp.lineage]}).encode(), 1)

    def _read(self, stamp: Stamp, place: str, packet: bytes | memoryview | None, *, forward: bool = True) -> str:
        said = json.loads(bytes(packet or b""))
        stage = self.span.stage
        if said["basis"] != self.bases.get(stamp.basis_version):
            self.judge.object(
                f"stage {stage} reads a packet of {said['basis']} under {self.bases.get(stamp.basis_version)}"
            )
        if said["place"] != place or said["version"] != [stamp.tick, stamp.lineage]:
            self.judge.object(
                f"stage {stage} reads a packet of {said['place']}, tick {said['version'][0]}, as one of {place}"
            )
        if forward and stamp.mode is Mode.TRAIN:
            mine = self._references.get(f"came {place}", "")
            if said["refers"] and (said["refers"] != mine or self.world.forgets(stage, stamp, place)):
                raise ReferenceMismatch(1, 0)
            self._staged[f"came {place}"] = said["value"]
        return said["value"]

    def _content(self, stamp: Stamp, place: str) -> str:
        batch = self.batches[stamp.batch]
        return chain(place, batch.targets_M.tolist())

    # The work of a round -----------------------------------------------------------------------------------------------

    def forward(self, stamp: Stamp, microbatch: int, packet: bytes | None) -> Packet:
        place = self._place(stamp, microbatch)
        entered = "" if self.span.is_first else self._read(stamp, place, packet)
        self._live[microbatch] = chain("forward", self.weights, entered, self._content(stamp, place))
        return self._packet(stamp, place, self._live[microbatch])

    def resend(self, stamp: Stamp, microbatch: int) -> Packet:
        return self._packet(stamp, self._place(stamp, microbatch), self._live[microbatch], whole=True)

    def loss(self, stamp: Stamp, microbatch: int, packet: bytes | None) -> Packet | None:
        place = self._place(stamp, microbatch)
        entered = "" if self.span.is_first else self._read(stamp, place, packet)
        old = self._old.get(place, "")
        return self._gather(stamp, place, chain("loss", self.weights, entered, self._content(stamp, place), old))

    def backward(self, stamp: Stamp, microbatch: int, packet: bytes) -> Packet | None:
        place = self._place(stamp, microbatch)
        came = self._read(stamp, place, packet, forward=False)
        return self._gather(stamp, place, chain("backward", self._live.pop(microbatch), came))

    def _gather(self, stamp: Stamp, place: str, gradient: str) -> Packet | None:
        if stamp.mode is not Mode.PROBE:
            self._gathered.append(gradient)
        return None if self.span.is_first else self._packet(stamp, place, gradient, whole=True)

    def compare(self, stamp: Stamp) -> None:
        self._live.clear()

    def score(self, stamp: Stamp, microbatch: int, packet: bytes | None) -> Packet | None:
        place = self._place(stamp, microbatch)
        entered = "" if self.span.is_first else self._read(stamp, place, packet, forward=False)
        value = chain("score", self.weights, entered, self._content(stamp, place))
        if not self.span.is_last:
            return self._packet(stamp, place, value)
        self._old[place] = value
        return None

    def tally(self, stamp: Stamp) -> Tally:
        if len(self._gathered) != stamp.microbatches:
            self.judge.object(
                f"stage {self.span.stage} tallies {len(self._gathered)} of {stamp.microbatches} gradients"
            )
        gated, broken = self.world.verdict(stamp)
        self._tallied = stamp
        fault = "NaN" if broken == self.span.stage and stamp.microbatches else ""
        return Tally([float(int(chain(self._gathered)[:4], 16))], fault, gated and self.span.is_last, {})

    def apply(self, stamp: Stamp, decide: Decide) -> list[Any]:
        if decide.outcome == Outcome.HOLD:
            return []
        tallied, self._tallied = self._tallied, None
        if tallied != stamp or stamp.tick != self.tick:
            self.judge.object(
                f"stage {self.span.stage} at tick {self.tick} applies tick {stamp.tick}, having tallied {tallied}"
            )
        if decide.outcome == Outcome.COMMIT:
            self.weights = chain(self.weights, self._gathered, decide.coefficient, stamp.step)
            self._references |= self._staged
        self.history = chain(self.history, *journal_line(stamp, decide))
        self.tick += 1
        self._gathered, self._staged, self._live = [], {}, {}
        if decide.end_of_batch:
            self.batches.pop(stamp.batch, None)
            self._references, self._old = {}, {}
            self.bases = {v: b for v, b in self.bases.items() if v >= stamp.basis_version}
        self.judge.applies(self, stamp, decide)
        return []

    def take_capture(self) -> None:
        return None

    # State -------------------------------------------------------------------------------------------------------------

    def publish(self, version: int) -> None:
        self.published = {version: {}}

    def to_shard(self, meta: dict[str, Any]) -> Shard:
        vocab = self.manifest.vocab
        batches = {n: to_bytes(batch_data(b, vocab)).hex() for n, b in self.batches.items()}
        state = {"tick": self.tick, "weights": self.weights, "history": self.history, "batches": batches}
        state |= {"bases": self.bases, "old": self._old, "references": self._references}
        return Shard({"nothing": torch.zeros(1)}, meta | {"pretend": state})

    def from_shard(self, shard: Shard) -> None:
        state, size = shard.meta["pretend"], self.manifest.config.swarm.microbatch_size
        self.tick, self.weights, self.history = state["tick"], state["weights"], state["history"]
        self.bases = {int(v): b for v, b in state["bases"].items()}
        self._old, self._references = state["old"], state["references"]
        held = {n: from_bytes(BatchData, bytes.fromhex(b)) for n, b in state["batches"].items()}
        self.batches = {int(n): read_batch(b, size, self.manifest.vocab) for n, b in held.items()}


@dataclass(frozen=True)
class World:
    """What does not depend on the clock: how ticks end, and what receivers forget."""

    seed: int
    stages: int

    def _draw(self, *what: object) -> random.Random:
        return random.Random(f"{self.seed} {what}")

    def verdict(self, stamp: Stamp) -> tuple[bool, int]:
        """(gated, the stage whose gradient is not finite; -1: none)."""
        draw = self._draw("verdict", stamp.batch, stamp.pass_, stamp.slice)
        return stamp.pass_ > 1 and draw.random() < 0.15, draw.randrange(self.stages) if draw.random() < 0.08 else -1

    def forgets(self, stage: int, stamp: Stamp, place: str) -> bool:
        """Whether a receiver has dropped the rows that a packet refers to."""
        return self._draw("forgets", stage, stamp.pass_, place).random() < 0.1


def journal_line(stamp: Stamp, decide: Decide) -> tuple[Any, ...]:
    """What of a decision the weights depend on: no epoch, no attempt, no clock."""
    what = (stamp.tick, stamp.batch, stamp.pass_, stamp.slice, stamp.microbatches, stamp.basis_version, stamp.step)
    return (*what, int(decide.outcome), decide.coefficient)


def undisturbed(
    stages: list[PretendCompute], lines: list[tuple[Stamp, Decide]], begin: Callable[[int, int], None]
) -> None:
    """The journal carried out by one process, round after round. `begin(batch, basis)` hands everybody a batch."""
    batch = None
    for stamp, decide in lines:
        if stamp.batch != batch:
            batch = stamp.batch
            begin(batch, stamp.basis_version)
            counts = stages[0].batches[batch].microbatches
            passes = stages[0].manifest.config.grpo.max_reuse
            if any(counts) and len(counts) + (passes - 1) * sum(map(bool, counts)) > 1:
                _through(stages, Stamp(**{**vars(stamp), "mode": Mode.SCORE, "microbatches": sum(counts)}))
        _through(stages, stamp)
        for stage in stages:
            stage.tally(stamp)
            stage.apply(stamp, decide)


def _through(stages: list[PretendCompute], stamp: Stamp) -> None:
    for microbatch in range(stamp.microbatches):
        packet: Any = None
        for stage in stages:
            work = stage.score if stamp.mode is Mode.SCORE else stage.loss if stage.span.is_last else stage.forward
            try:
                packet = work(stamp, microbatch, packet and packet.payload)
            except ReferenceMismatch:
                whole = stages[stage.span.stage - 1].resend(stamp, microbatch)
                packet = work(stamp, microbatch, whole.payload)
        if stamp.mode is Mode.TRAIN:
            for stage in reversed(stages[:-1]):
                packet = stage.backward(stamp, microbatch, packet.payload)
