"""Merging the anchor's correction into a stage's gradient: tensors and ticks in, gradients changed in place. What may
be merged in which tick is decided elsewhere; how a correction travels is the codec's.

For tick t, a correction made from the weights of tick s, age = t - s (METHOD section 2):

    signed_ema   G = a G + (1 - a) |G| sign(M)                            sign(0) = 0
    held_delta   G = G + lambda mu^age delta                              delta = M_s - G_comp(s)
                 lambda = cap min(1, 1/c), 0 when c > c_max, per tensor   c = ||delta|| / ||G||

Over the life of one correction no lambda rises, and mu^age falls, so neither does its weight. A correction with
t - s > k_max changes nothing, bit for bit; nor does one in a tick whose gradient is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from swarm_core.learning.errors import UnfitError

MergerKind = Literal["none", "signed_ema", "held_delta"]

# torch sums a long fp32 vector on the CPU one entry after the other: over 20 million a norm is off by 1e-3. Rows of 256
# in fp32 and their norms in fp64 cost the same and are off by 3e-10.
ROW = 256
CHUNK = 1 << 22  # entries of an inner product at once: its products take memory


class MergeError(UnfitError):
    """A spec, correction or state that does not fit."""


@dataclass(frozen=True)
class MergeSpec:
    """How corrections are merged: the knobs of [corrections] by their names there.

    `alpha` is signed_ema's; the rest but `k_max` is held_delta's. `age_from = "birth"` counts mu's age from the tick in
    which the correction was made; k_max always counts from the snapshot.
    """

    merger: MergerKind = "none"
    alpha: float = 0.25
    age_decay: float = 0.88
    age_from: Literal["snapshot", "birth"] = "snapshot"
    adaptive_lambda: Literal["ratio", "none"] = "ratio"
    lambda_cap: float = 0.5
    c_max: float = 4.0
    k_max: int = 40

    def __post_init__(self) -> None:
        self._require(self.merger in ("none", "signed_ema", "held_delta"), "merger", "none, signed_ema or held_delta")
        self._require(0 <= self.alpha <= 1, "alpha", "0 <= alpha <= 1")
        self._require(0 <= self.age_decay <= 1, "age_decay", "0 <= age_decay <= 1: no weight may rise with age")
        self._require(self.age_from in ("snapshot", "birth"), "age_from", "snapshot or birth")
        self._require(self.adaptive_lambda in ("ratio", "none"), "adaptive_lambda", "ratio or none")
        self._require(0 <= self.lambda_cap < math.inf, "lambda_cap", "a finite number >= 0")
        self._require(self.c_max > 0, "c_max", "> 0")
        self._require(self.k_max >= 0, "k_max", ">= 0")

    def _require(self, holds: bool, field: str, wanted: str) -> None:
        if not holds:
            raise MergeError(field, getattr(self, field), wanted, "change the [corrections] section")

    def lambda_of(self, gradient: float, delta: float) -> float:
        """lambda of one tensor from the norms of its gradient and its delta, before what its life has seen."""
        if self.adaptive_lambda == "none" or delta == 0:
            return self.lambda_cap
        c = delta / gradient if gradient > 0 else math.inf
        return 0.0 if c > self.c_max else self.lambda_cap * min(1.0, 1.0 / c)

    def fade(self, correction: HeldCorrection, tick: int) -> float:
        """mu^age. A birth after `tick` counts as age 0: the run was set back since, its snapshot still stands."""
        since = correction.tick if self.age_from == "snapshot" else min(correction.born, tick)
        return self.age_decay ** (tick - since)


@dataclass(frozen=True, eq=False)
class HeldCorrection:
    """A correction as a stage holds it.

    `tick` is s, of its snapshot, `born` the newest tick the anchor knew of when it was made. `tensors`: M or sign(M)
    (signed_ema), or delta (held_delta), for each parameter in order, best on the gradients' device, any dtype.
    """

    version: int
    tick: int
    born: int
    tensors: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if self.version < 1:
            raise MergeError("correction version", self.version, ">= 1", "0 stands for none: hold nothing")


@dataclass(frozen=True)
class MergeSums:
    """What a merge did, as sums over a stage's tensors: those of all stages are added up (`+`) before `measures`.

    C is delta, or sign(M) for signed_ema; the dose is merged G minus G. Squared norms: `gradient_sq` of G before,
    `correction_sq` of C, `dose_sq`, `merged_sq` of G after; `dot` is G.C. Of held_delta alone, 0 for signed_ema:
    `delta_sq` of delta, `lambda_sq` of lambda delta (before mu^age).
    """

    gradient_sq: float = 0.0
    correction_sq: float = 0.0
    dose_sq: float = 0.0
    merged_sq: float = 0.0
    dot: float = 0.0
    delta_sq: float = 0.0
    lambda_sq: float = 0.0

    def __add__(self, other: MergeSums) -> MergeSums:
        return MergeSums(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def measures(sums: MergeSums) -> dict[str, float]:
    """The metrics of a tick's correction from sums over all stages; one without a denominator is left out.

    correction/cos = cos(C, G), correction/share = ||dose|| / ||merged G||, and of held_delta correction/c = ||delta|| /
    ||G|| and correction/lambda = ||lambda_i delta_i|| / ||delta||: the lambda that the tensors got, weighted by delta.
    """
    out: dict[str, float] = {}
    if sums.delta_sq > 0:
        out["correction/lambda"] = math.sqrt(sums.lambda_sq / sums.delta_sq)
        if sums.gradient_sq > 0:
            out["correction/c"] = math.sqrt(sums.delta_sq / sums.gradient_sq)
    if sums.merged_sq > 0:
        out["correction/share"] = math.sqrt(sums.dose_sq / sums.merged_sq)
    if sums.gradient_sq > 0 and sums.correction_sq > 0:
        out["correction/cos"] = sums.dot / (math.sqrt(sums.gradient_sq) * math.sqrt(sums.correction_sq))
    return out


class Merger:
    """One stage's merges and the memory that keeps lambdas from rising.

    `merge` can be repeated (a retried tick); `settle` ends the tick, and only a committed one moves the memory. Every
    tensor is merged on its own, so any split over stages gives the same bits.
    """

    def __init__(self, spec: MergeSpec, tensors: int) -> None:
        self.spec = spec
        self.tensors = tensors
        self._version = 0  # whose life the lambdas are of; 0: of none yet
        self._tick = 0  # the last committed one of that life
        self._lambdas: list[float] = []
        self._pending: tuple[int, int, list[float]] | None = None

    @torch.no_grad()
    def merge(self, gradients: Sequence[Tensor], correction: HeldCorrection | None, tick: int) -> MergeSums | None:
        """Merge `correction` into `gradients` (fp32 or fp64, in parameter order), in place.

        None: there was nothing to merge (no correction or merger, older than k_max, something not finite). With sums
        of `dose_sq` 0 every lambda was 0; gradients are then as they were. Waits for the device once or twice.

        Raises: MergeError for a negative age, a version or tick before the last settled one, other shapes.
        """
        self._pending = None
        if correction is None or self.spec.merger == "none":
            return None
        if tick < correction.tick:
            todo = "a rollback must drop the corrections of later ticks"
            raise MergeError(f"correction {correction.version}", f"age {tick - correction.tick}", ">= 0", todo)
        if tick - correction.tick > self.spec.k_max:
            return None
        self._check(gradients, correction, tick)
        signed = self.spec.merger == "signed_ema"
        cells = []
        for gradient, held in zip(gradients, correction.tensors, strict=True):
            held = held.to(gradient)
            size = _norm(held)
            c = held.sign() if signed else held
            # size once more: the sign of a nan is 0, and it must not pass for one.
            cells += [_norm(gradient), _norm(c) if signed else size, _dot(gradient, c), size]
        norms = _read(cells, 4)
        if not all(math.isfinite(number) for row in norms for number in row):
            return None
        if signed:
            return self._mix(gradients, correction, norms)
        return self._add(gradients, correction, tick, norms)

    def settle(self, *, keep: bool) -> None:
        """The tick is decided. Committed (`keep`): its lambdas become the ceilings of this correction's life."""
        if keep and self._pending is not None:
            self._version, self._tick, self._lambdas = self._pending
        self._pending = None

    def state(self) -> dict[str, Any]:
        """The memory as settled, JSON-able; floats survive exactly."""
        return {"version": self._version, "tick": self._tick, "lambdas": list(self._lambdas)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a saved memory. Raises MergeError, and changes nothing, when it is not one of such a stage."""
        version, tick, lambdas = (state.get(key) for key in ("version", "tick", "lambdas"))
        whole = all(type(number) is int and number >= 0 for number in (version, tick))
        fits = isinstance(lambdas, list) and len(lambdas) == (self.tensors if version else 0)
        if not (whole and fits and all(type(n) in (int, float) and 0 <= n < math.inf for n in lambdas or [])):
            wanted = f"version, tick and {self.tensors} lambdas (none with version 0)"
            raise MergeError("merger state", repr(state)[:80], wanted, "load the state() of this stage with this split")
        assert type(version) is int and type(tick) is int and isinstance(lambdas, list)
        self._version, self._tick, self._lambdas, self._pending = version, tick, [float(n) for n in lambdas], None

    def _add(
        self, gradients: Sequence[Tensor], correction: HeldCorrection, tick: int, norms: list[list[float]]
    ) -> MergeSums:
        fade = self.spec.fade(correction, tick)
        same_life = correction.version == self._version
        lambdas = []
        sums = MergeSums()
        for i, (gradient, delta) in enumerate(zip(gradients, correction.tensors, strict=True)):
            g, d, dot, _ = norms[i]
            lambda_ = self.spec.lambda_of(g, d)
            lambdas.append(min(lambda_, self._lambdas[i]) if same_life else lambda_)
            weight = lambdas[i] * fade
            if weight > 0 and d > 0:  # adding zeros would still turn -0 into 0
                gradient.add_(delta.to(gradient), alpha=weight)
            dose, undimmed = weight * d, lambdas[i] * d
            merged_sq = max(0.0, g * g + 2 * weight * dot + dose * dose)
            sums += MergeSums(g * g, d * d, dose * dose, merged_sq, dot, d * d, undimmed * undimmed)
        self._pending = (correction.version, tick, lambdas)
        return sums

    def _mix(self, gradients: Sequence[Tensor], correction: HeldCorrection, norms: list[list[float]]) -> MergeSums:
        alpha, cells = self.spec.alpha, []
        for gradient, held in zip(gradients, correction.tensors, strict=True):
            # a G + (1 - a) |G| sign(M) is G times one of three factors; so G keeps its bits where the signs agree.
            agreement = held.to(gradient).sign().mul_(gradient)
            factor = torch.full_like(gradient, alpha)
            factor.masked_fill_(agreement > 0, 1.0).masked_fill_(agreement < 0, 2 * alpha - 1)
            dose = torch.addcmul(gradient, gradient, factor, value=-1)
            gradient.mul_(factor)
            cells += [_norm(dose), _norm(gradient)]
        sums = MergeSums()
        for (g, c, dot, _), (dose_norm, merged) in zip(norms, _read(cells, 2), strict=True):
            sums += MergeSums(g * g, c * c, dose_norm * dose_norm, merged * merged, dot)
        return sums

    def _check(self, gradients: Sequence[Tensor], correction: HeldCorrection, tick: int) -> None:
        name = f"correction {correction.version}"
        if not len(gradients) == len(correction.tensors) == self.tensors:
            got = f"{len(correction.tensors)} tensors for {len(gradients)} gradients"
            raise MergeError(name, got, f"{self.tensors} of each", "use the correction of this stage")
        for i, (gradient, held) in enumerate(zip(gradients, correction.tensors, strict=True)):
            if gradient.shape != held.shape or gradient.dtype not in (torch.float32, torch.float64):
                got = f"{held.dtype} {list(held.shape)} for a gradient {gradient.dtype} {list(gradient.shape)}"
                raise MergeError(f"{name}, tensor {i}", got, "one shape, fp32 or fp64", "use that of this stage")
        if correction.version < self._version or (correction.version == self._version and tick < self._tick):
            got = f"version {correction.version} in tick {tick}"
            wanted = f"nothing before version {self._version} in tick {self._tick}, the last settled"
            raise MergeError(name, got, wanted, "a rollback must load the merger's state of its checkpoint")


def smooth(mean: Sequence[Tensor] | None, new: Sequence[Tensor], beta: float) -> list[Tensor]:
    """beta mean + (1 - beta) new: the running mean over dense gradients, starting at the first one.

    Shapes and dtypes are those of `new`, whose tensors come back as they are for beta 0 or without a mean. Averaging
    compounds staleness: above 0 only to reproduce the record (METHOD section 2).
    """
    if not 0 <= beta < 1:
        raise MergeError("beta_anc", beta, "0 <= beta_anc < 1", "change the [corrections] section")
    if mean is None or beta == 0:
        return list(new)
    if [m.shape for m in mean] != [n.shape for n in new]:
        raise MergeError("mean", f"{len(mean)} tensors", f"the shapes of the {len(new)} new ones", "start it anew")
    with torch.no_grad():
        return [n.mul(1 - beta).add_(m.to(n), alpha=beta) for m, n in zip(mean, new, strict=True)]


def _norm(x: Tensor) -> Tensor:
    """The 2-norm, a scalar in fp64 on x's device; inf or nan where x has any."""
    flat = x.reshape(-1)
    whole = flat.numel() // ROW * ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1)
    norm: Tensor = torch.linalg.vector_norm(torch.cat((rows, flat[whole:])), dtype=torch.float64)
    return norm


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner product, a scalar in fp64 on x's device."""
    x, y = x.reshape(-1), y.reshape(-1)
    starts = range(0, max(1, x.numel()), CHUNK)
    parts = [torch.linalg.vecdot(x[i : i + CHUNK], y[i : i + CHUNK]) for i in starts]
    return torch.stack(parts).sum(dtype=torch.float64)


def _read(cells: list[Tensor], columns: int) -> list[list[float]]:
    """Scalars of one device as rows of floats, in one read."""
    return torch.stack(cells).view(-1, columns).tolist() if cells else []
