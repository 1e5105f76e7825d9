"""The slow circuit on a stage: weights copied for the anchor, its corrections held and merged. Tensors; no frame, no stream.

Two things meet the tick here, both on the compute thread: when a snapshot tick is committed its weights are copied before
the optimizer moves them, and when a tick is tallied the stamped correction is merged into its gradient. Everything
between the two, shipping, replay and the way back, happens elsewhere and is waited for by nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from codec import corrections, weight_delta
from codec.errors import CodecError
from swarm_core.config import RunConfig
from swarm_core.learning.batch import Batch
from swarm_core.learning.merge import HeldCorrection, Merger, MergeSpec, MergeSums
from swarm_core.manifest import Manifest
from swarm_core.wire.corrections import correction_spec, digest_of
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import Correction
from swarm_worker.schedule import Stamp

BF16_BITS, TF32_BITS = 7, 10  # of a mantissa, the leading one apart
LARGEST = 1e15  # of a correction's numbers: the norm of a trillion of them is far from overflowing
SUMS = "correction/sum/"  # vote numbers that are added up over the stages
_SUMS = {item.name for item in fields(MergeSums)}


class CorrectionRefused(Exception):
    """A correction that cannot be merged here; the message says why. The tick goes on without it."""


@dataclass(frozen=True)
class Capture:
    """A stage's weights as a tick began, and on the first and the last stage what the tick consumed."""

    version: int
    tick: int
    lineage: int
    basis_version: int
    pass_: int
    weights: list[Tensor]  # on the CPU, in the order of the stage's parameters, as the stage holds them
    mantissa_bits: Sequence[int | None] = ()
    slice: Batch | None = None  # stage 0: the tick's sequences, with their token ids
    scored: Batch | None = None  # last stage: the same, with the log-probs that it took

    def rounded(self) -> list[Tensor]:
        """The weights as they travel. Slow for a large stage, so not a matter of the tick."""
        kept = self.mantissa_bits or [None] * len(self.weights)
        return [w if b is None else weight_delta.rounded(w, b) for w, b in zip(self.weights, kept, strict=True)]


class Correcting:
    """What one stage holds of the anchor's corrections. One thread calls it; `held` may be read from another.

    `held` maps versions to (snapshot tick, first tick they may be merged in). A version goes once a newer one has been
    merged, or once it is older than `k_max`, so its number is bounded by k_max / m_cadence.
    """

    def __init__(
        self, manifest: Manifest, stage: int, parameters: Sequence[nn.Parameter], mantissa_bits: Sequence[int | None]
    ) -> None:
        config, fires = manifest.config, manifest.fires()
        assert fires is not None, "a run without a merger has no corrections"
        self._fires, self._spec, self._k_max = fires, correction_spec(config), config.corrections.k_max
        self._parameters = list(parameters)
        self._counts_from_birth = config.corrections.age_from == "birth"
        self._shapes = [tuple(p.shape) for p in self._parameters]
        self._mantissa_bits = mantissa_bits
        self._span = manifest.spans[stage]
        self._merger = Merger(merge_spec(config), len(self._parameters))
        self._packets: dict[int, Correction] = {}
        self._decoded: HeldCorrection | None = None  # the one in use; the others stay packets, which are small
        self._taken: dict[int, tuple[int, int]] = {}  # snapshots by version: tick and lineage, the history they are of
        self._newest = 0  # version of the last of them
        self._oldest = 0  # tick of the oldest snapshot whose correction may still be merged

    @property
    def held(self) -> dict[int, tuple[int, int]]:
        return {version: (c.tick, c.not_before) for version, c in list(self._packets.items())}

    @property
    def largest_packet(self) -> int:
        return corrections.largest_bytes(self._spec, self._shapes)

    # Corrections in ----------------------------------------------------------------------------------------------------

    def check(self, message: Correction) -> None:
        """Everything that can be wrong with a correction, decoding it once to see. Raises CorrectionRefused.

        Reads nothing that the compute thread changes but which snapshots were taken, so it runs on a thread of its own.
        """
        name = f"correction {message.version} of tick {message.tick}"
        if message.tick < self._oldest:
            raise CorrectionRefused(f"{name}: older than k_max = {self._k_max} ticks")
        if (taken := self._taken.get(message.version)) != (message.tick, message.lineage):
            seen = "took none" if taken is None else f"took it in tick {taken[0]} on history {taken[1]:016x}"
            raise CorrectionRefused(f"{name}, history {message.lineage:016x}: of that snapshot this stage {seen}")
        if message.born < message.tick or message.not_before < message.tick:
            raise CorrectionRefused(f"{name}: born in tick {message.born}, for tick {message.not_before}: before it")
        if digest_of(message.packet) != message.digest:
            raise CorrectionRefused(f"{name}: the digest does not match: damaged on the way")
        try:
            tensors = corrections.decode(message.packet, self._spec, self._shapes)
        except CodecError as error:
            raise CorrectionRefused(f"{name}: {error}") from None
        largest = max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)
        if largest > LARGEST:  # its norm would overflow here and perhaps not elsewhere, and all must merge it or none
            raise CorrectionRefused(f"{name}: a number of {largest:.1e}; wanted at most {LARGEST:.0e}")

    def hold(self, message: Correction) -> None:
        """Keep a checked correction; the same one again changes nothing."""
        self._packets.setdefault(message.version, message)

    # The tick ----------------------------------------------------------------------------------------------------------

    def merge(self, stamp: Stamp) -> dict[str, float]:
        """Merge the stamped correction into the parameters' gradients; the numbers for the vote."""
        if not stamp.correction:
            return {}
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        correction = self._in_use(stamp.correction)
        sums = self._merger.merge(gradients, correction, stamp.tick)
        if sums is None:
            return {}
        since = correction.born if self._counts_from_birth else correction.tick
        about = {"version": correction.version, "K": stamp.tick - correction.tick, "age": max(0, stamp.tick - since)}
        numbers = {f"correction/{name}": float(value) for name, value in about.items()}
        return numbers | {SUMS + name: float(value) for name, value in vars(sums).items()}

    def _in_use(self, version: int) -> HeldCorrection:
        if self._decoded is None or self._decoded.version != version:
            if version not in self._packets:
                raise BadFrame(f"a tick is to merge correction {version}; this stage holds {sorted(self._packets)}")
            message = self._packets[version]
            tensors = corrections.decode(message.packet, self._spec, self._shapes)
            here = tuple(t.to(p) for t, p in zip(tensors, self._parameters, strict=True))
            self._decoded = HeldCorrection(version, message.tick, message.born, here)
        return self._decoded

    def settle(self, stamp: Stamp, *, committed: bool) -> None:
        """The tick is decided: what a merge measured counts only if it was committed. Then what is too old goes."""
        self._merger.settle(keep=committed)
        oldest = self._oldest = stamp.tick + 1 - self._k_max
        gone = {v for v, c in self._packets.items() if c.tick < oldest or v < stamp.correction}
        self._packets = {v: c for v, c in self._packets.items() if v not in gone}
        self._taken = {v: at for v, at in self._taken.items() if at[0] >= oldest}
        if self._decoded is not None and self._decoded.version in gone:
            self._decoded = None

    def capture(self, stamp: Stamp, batch: Batch) -> Capture | None:
        """A committed tick, before its step: the copy for the anchor, if a snapshot is due.

        One that falls due in a skipped tick is taken in the next one that is committed: a gated tick has no gradient
        worth replaying, and to wait a whole cadence would lose half of them where many are gated.
        """
        version = self._fires.count_before(stamp.tick + 1)
        if version <= self._newest:
            return None
        self._newest, self._taken[version] = version, (stamp.tick, stamp.lineage)
        weights = [p.detach().to("cpu", copy=True) for p in self._parameters]
        first, last = self._span.is_first, self._span.is_last
        part = batch.only(stamp.slice) if first or last else None
        return Capture(
            version,
            stamp.tick,
            stamp.lineage,
            stamp.basis_version,
            stamp.pass_,
            weights,
            self._mantissa_bits,
            part if first else None,
            part if last else None,
        )

    # Checkpoints -------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors by name, metadata): the packets held, as bytes, and what the merger remembers."""
        tensors = {str(v): torch.frombuffer(bytearray(c.packet), dtype=torch.uint8) for v, c in self._packets.items()}
        held = [[v, c.tick, c.born, c.not_before, c.lineage] for v, c in self._packets.items()]
        taken = [[v, tick, lineage] for v, (tick, lineage) in self._taken.items()]
        return tensors, {"held": held, "taken": taken, "newest": self._newest, "merger": self._merger.state()}

    def load(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Take up what `state` gave, bit for bit."""
        self._decoded = None
        self._taken = {int(v): (int(tick), int(lineage)) for v, tick, lineage in metadata["taken"]}
        self._newest = int(metadata["newest"])
        self._packets = {}
        for version, tick, born, not_before, lineage in metadata["held"]:
            packet = tensors[str(version)].numpy().tobytes()
            message = Correction(version, tick, born, not_before, lineage, packet, digest_of(packet))
            self._packets[version] = message
        self._merger.load(metadata["merger"])


def snapshot_bits(
    config: RunConfig, names: Sequence[str], parameters: Sequence[nn.Parameter], compute_dtype: torch.dtype
) -> list[int | None]:
    """Mantissa bits that each tensor of a snapshot keeps; None: all.

    With `auto` a replay sees what the stage computed with: matrices that are cast to bf16 for their products are rounded
    to it, which changes nothing. All else, and everything where stages compute in fp32, keeps TF32's 10 bits: bf16's 7
    undo the newest steps, and the small difference of two gradients with them (experiments/LOG.md).
    """
    which = config.anchor.snapshot
    if which == "exact" or any(p.dtype is torch.float64 for p in parameters):
        return [None] * len(names)
    in_bf16 = [compute_dtype is torch.bfloat16 and p.dim() == 2 and "embed" not in n
               for n, p in zip(names, parameters, strict=True)]  # fmt: skip
    return [BF16_BITS if which == "bf16" or low else TF32_BITS for low in in_bf16]


def merge_spec(config: RunConfig) -> MergeSpec:
    """The [corrections] knobs in the words of the learning room."""
    c = config.corrections
    return MergeSpec(c.merger, c.alpha, c.age_decay, c.age_from, c.adaptive_lambda, c.lambda_cap, c.c_max, c.k_max)


def summed(votes: Sequence[dict[str, float]]) -> MergeSums | None:
    """The sums over all stages of what their votes say of a merge; None where none did. Raises BadFrame."""
    names = {name for numbers in votes for name in numbers if name.startswith(SUMS)}
    if not names:
        return None
    sums = {name[len(SUMS) :]: sum(numbers.get(name, 0.0) for numbers in votes) for name in names}
    for name, value in sums.items():
        if name not in _SUMS or (name.endswith("_sq") and value < 0):
            raise BadFrame(
                f"a vote says {name[:99]!r} = {value} of its merge; wanted sums of squares and {sorted(_SUMS)}"
            )
    return MergeSums(**sums)
