"""The compression bases: version 0 from the initial checkpoint, and the versions after it. No stream, no clock.

With `anchor.q_source = stage_sketch` a basis is refreshed by one warm-started step (codec/fit.py): over a window each
sender sums V_C = C E of what it sends, with fit `metric` each receiver of activations V_G = G D^T of their gradients,
and the anchor adds those of all replicas and makes the next pair. That is H x r numbers a boundary, direction and part,
and no backward pass on the anchor. With `anchor_replay` the pairs come from replay_bases.py; what a version is, and what
is said of it, is the same.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from anchor_node.steering import Decision, Steering, Window
from codec.basis import Basis, pair_error
from codec.errors import SpecError
from codec.fit import Fit, FitName, fit_pair, metric_weights, moment, moment_weights, overlap, refine, widened
from codec.spec import Direction, LinkSpec
from swarm_core.learning.logprobs import token_logprobs
from swarm_core.learning.microbatch import Microbatch, Sample, completion_rows, pack_rows, split_microbatches
from swarm_core.learning.stage import Stage
from swarm_core.wire.bases import Key, as_changes, basis_of, key_of, matrix_of, sketch_of
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import BasisMatrix, BasisSet, Sketch

CALIBRATION_SEQUENCES = 8  # in one forward; the anchor is slow, not large
LABEL_DRAWS = 4  # of the metric's labels at each position; on 32 prompts a single one costs a tenth of the accuracy
KEPT_VERSIONS = 4  # whose sketches may still come: batches stay on the version they began with
KEPT_WINDOWS = 4  # whose sketches of one boundary, direction and part wait for the others
MOST_COUNTED = 1 << 48  # rows or bytes in a window: more than any line carries in one
MOMENT, METRIC = 0, 1  # Sketch.part
log = logging.getLogger(__name__)


def directions(spec: LinkSpec) -> list[Direction]:
    """The directions that have a basis of their own."""
    return sorted({d for d in Direction if spec.basis_direction(d) is d})


def calibration_samples(
    prompts: Iterable[Sequence[int]], answers: Iterable[Sequence[int]], generator: torch.Generator
) -> list[Sample]:
    """Prompts with their answers, each with advantage +1 or -1.

    Signs drawn at random give the gradients the spread that advantages of unsettled groups have; all of one sign would
    calibrate the backward basis on supervised learning.
    """
    samples = []
    for prompt, answer in zip(prompts, answers, strict=True):
        sign = 1.0 if torch.rand((), generator=generator) < 0.5 else -1.0
        ids = torch.tensor(list(answer), dtype=torch.int64)
        samples.append(Sample(torch.tensor(list(prompt), dtype=torch.int64), ids, sign, torch.zeros(len(ids))))
    return samples


def first_bases(
    stages: Sequence[Stage],
    samples: Sequence[Sample],
    spec: LinkSpec,
    fit: FitName = "plain",
    ridge: float = 0.03,
    outliers: float = 0.0,
    steps: tuple[float, float] = (0.0, 0.0),
) -> BasisSet:
    """Version 0, at initial weights: `fit_pair` of the second moments of h and of dL/dh at every boundary.

    `stages` chain to the whole model; `steps` are the quantiser's, forward and backward. With fit `metric` the metric
    of h is the Fisher information of the positions that predict the answers: labels are drawn from the model's own
    distribution, LABEL_DRAWS times (seeded). The answers themselves are one draw, and a worse one.
    """
    moments: dict[Key, Tensor] = {}
    metrics: dict[Key, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for mb in split_microbatches(samples, CALIBRATION_SEQUENCES):
        boundaries, logp_M, draws = _forward(stages, mb, LABEL_DRAWS if fit == "metric" else 0, generator)
        rows_NH = [pack_rows(h.detach(), mb).float() for h in boundaries]
        for draw_M in draws:
            for boundary, g in enumerate(torch.autograd.grad(draw_M.sum(), boundaries, retain_graph=True)):
                g_NH = pack_rows(g, mb)
                part_HH = moment(g_NH, metric_weights(rows_NH[boundary], g_NH, outliers))
                _accumulate(metrics, (boundary, Direction.FORWARD), part_HH)
        grads = torch.autograd.grad(-(logp_M * mb.advantages_M).sum(), boundaries) if boundaries else ()
        for boundary, g in enumerate(grads):
            for direction, x_NH in ((Direction.FORWARD, rows_NH[boundary]), (Direction.BACKWARD, pack_rows(g, mb))):
                part_HH = moment(x_NH, moment_weights(x_NH, direction, fit, outliers))
                _accumulate(moments, (boundary, direction), part_HH)
    matrices = []
    for key in sorted(k for k in moments if k[1] in directions(spec)):
        made = fit_pair(moments[key], metrics.get(key), _most(spec, key[1]), ridge)
        matrices.append(_matrix(key, 0, made.encoder_HR, made.decoder_RH, steps[int(key[1])]))
    return BasisSet(0, 0, matrices)


def part_for_stage(bases: BasisSet, stage: int) -> BasisSet:
    """Only the boundaries on either side of a stage."""
    near = [m for m in bases.matrices if m.boundary in (stage - 1, stage)]
    return replace(bases, matrices=near)


def condition(basis: Basis) -> float:
    """||E|| ||D||, spectral: how many times larger the share of a row that changes may be than that of its coefficients.

    1 for an orthonormal basis, 5 to 30 for sound pairs in a metric (the smaller `fit_ridge`, the more). It is what tells
    a broken basis: columns that are dependent to 1 % have 200, and from 2^9 on one rounding to bf16 may be as large as
    the row, while D E is still the identity to 1e-5.
    """
    encoder_HR, decoder_RH = basis.encoder_HR.double(), basis.decoder_RH.double()
    squares = [torch.linalg.eigvalsh(gram)[-1] for gram in (encoder_HR.T @ encoder_HR, decoder_RH @ decoder_RH.T)]
    return float((squares[0] * squares[1]).sqrt())


class BasisKeeper:
    """Makes the next version when all boundaries, directions and parts of a window are in, or of a replay's pairs.

    `current` is the newest version exactly as it was broadcast: what a late member, and a checkpoint, must get.
    `changes` is the same for whoever holds the version before it; None for the first one.
    """

    def __init__(
        self,
        spec: LinkSpec,
        boundaries: int,
        current: BasisSet,
        fit: FitName = "plain",
        ridge: float = 0.03,
        steering: Mapping[Direction, Steering] | None = None,
    ) -> None:
        self.spec = spec
        self.current = current
        self.changes: BasisSet | None = None
        self.overlap: dict[Key, float] = {}  # of the newest version's encoders with those before
        self.share: dict[Key, float] = {}  # of all that the sketches show, in the fit's own measure, what it keeps
        self.weakest: dict[Key, float] = {}  # the least variance that it keeps over the largest
        self.decisions: dict[Key, Decision] = {}  # of the steering, for the newest version
        self._ridge = ridge
        self._steering = steering or {}
        self._boundaries = boundaries
        keys = [(b, d) for b in range(boundaries) for d in directions(spec)]
        self._wanted = {(*key, MOMENT) for key in keys}
        if fit == "metric":
            self._wanted |= {(*key, METRIC) for key in keys if key[1] is Direction.FORWARD}
        self._held = {current.version: self._read(current)}
        # What is in, by tick and version, of each part, and of that by sender: a sender's absurd ticks push out his own.
        self._seen: dict[tuple[int, Direction, int], dict[tuple[int, int], dict[int, _Sum]]] = {}
        self._done = -1  # tick of the newest window that was complete

    @property
    def version(self) -> int:
        return self.current.version

    @property
    def bases(self) -> dict[Key, Basis]:
        """The newest version, as everybody holds it."""
        return self._held[self.version]

    def held(self, version: int) -> dict[Key, Basis] | None:
        """A version as everybody held it, while it is among the newest few; None: it is gone."""
        return self._held.get(version)

    def numbers(self) -> dict[str, float]:
        """What the newest version is like, a boundary and direction, for the metrics.

        `overlap` (with the version before: drift), `fit` (the share it keeps), `weakest`, of what has just been made;
        `rank`, `step`, `condition` and `identity_error` (max |D E - I|) of the basis as everybody holds it.
        """
        measures: dict[str, Mapping[Key, float]] = {
            "overlap": self.overlap,
            "fit": self.share,
            "weakest": self.weakest,
            "rank": {key: basis.rank for key, basis in self.bases.items()},
            "step": {key: basis.step for key, basis in self.bases.items()},
            "condition": {key: condition(basis) for key, basis in self.bases.items()},
            "identity_error": {key: pair_error(b.encoder_HR, b.decoder_RH) for key, b in self.bases.items()},
        }
        return {
            f"basis/{name}_{direction.name.lower()}/boundary_{boundary}": value
            for name, values in measures.items()
            for (boundary, direction), value in values.items()
        }

    def add(self, sketch: Sketch, replica: int = 0) -> BasisSet | None:
        """Take one sketch; the new basis set when it was the last one missing. Raises BadFrame.

        Only sketches taken against the same version make up a window. Windows that stay incomplete are dropped as soon
        as a later one is complete, and so are sketches of versions long gone. The same sketch of the same replica counts
        once, whenever it comes again.
        """
        key = key_of(sketch.matrix, self._boundaries)
        if (*key, sketch.part) not in self._wanted:
            raise BadFrame(f"a sketch of boundary {key[0]}, {key[1].name}, part {sketch.part} was not asked for")
        if sketch.version not in self._held:
            return None
        height, columns = self.spec.width, self._held[sketch.version][key].rank
        one = _Sum(sketch_of(sketch.matrix, height, columns), sketch.trace, sketch.rows_seen, sketch.packet_bytes)
        if max(sketch.rows_seen, sketch.packet_bytes) > MOST_COUNTED:
            raise BadFrame(
                f"a sketch of {sketch.rows_seen} rows in {sketch.packet_bytes} bytes: no link carries so many"
            )
        if sketch.tick <= self._done:
            return None
        part, at = (*key, sketch.part), (sketch.tick, sketch.version)
        seen = self._seen.setdefault(part, {})
        seen.setdefault(at, {})[replica] = one
        self._seen[part] = {kept: seen[kept] for kept in sorted(seen)[-KEPT_WINDOWS:]}
        if not all(at in self._seen.get(wanted, {}) for wanted in self._wanted):
            return None
        window = {wanted: functools.reduce(operator.add, self._seen[wanted][at].values()) for wanted in self._wanted}
        self._done = sketch.tick
        self._seen = {p: {k: sums for k, sums in of.items() if k[0] > sketch.tick} for p, of in self._seen.items()}
        against = self._held[sketch.version]

        def refreshed(key: Key) -> Fit:
            return self._refresh(against[key], window[(*key, MOMENT)], window.get((*key, METRIC)))

        return self._next(sketch.tick, refreshed, {key: (against[key].step, window[(*key, MOMENT)]) for key in against})

    def adopt(self, tick: int, fits: Mapping[Key, Fit]) -> BasisSet | None:
        """The next version of pairs that were fitted elsewhere (replay_bases.py), of a tick; None without a sound one.

        Where there is none the basis in use stays. So do all steps: without packets there is nothing to steer by.
        """

        def pair(key: Key) -> Fit:
            if key not in fits:
                raise SpecError("pairs of a replay", sorted(fits), "one of every boundary and direction")
            return fits[key]

        return self._next(tick, pair, {key: (basis.step, None) for key, basis in self.bases.items()})

    def _next(
        self, tick: int, fit: Callable[[Key], Fit], seen: Mapping[Key, tuple[float, _Sum | None]]
    ) -> BasisSet | None:
        """The next version; where `fit` gives no basis the one in use stays; None when it gives none at all.

        `seen`: the step that a pair is to have unless it is steered, and what the steering goes by.
        """
        version, matrices = self.version + 1, []
        held: dict[Key, Basis] = {}
        self.decisions, self.share, self.weakest = {}, {}, {}
        for matrix in self.current.matrices:
            key = key_of(matrix, self._boundaries)
            try:
                made = fit(key)
                matrix, held[key] = self._steered(key, version, made, *seen[key])
                self.share[key] = float(made.eigenvalues_R.sum()) / made.total
                self.weakest[key] = float(made.eigenvalues_R[-1]) / max(float(made.eigenvalues_R[0]), 1e-300)
            except (SpecError, BadFrame, torch.linalg.LinAlgError) as error:
                log.warning("basis of boundary %d, %s, stays as it is: %s", key[0], key[1].name.lower(), error)
                held[key] = basis_of(matrix, version, self.spec)
            matrices.append(matrix)
        if not self.share:
            return None
        before, last = self.bases, self.current
        self.current = BasisSet(version, tick, matrices)
        self.changes = as_changes(self.current, last)
        self._held[version] = held
        self._held = {v: held for v, held in self._held.items() if v > version - KEPT_VERSIONS}
        self.overlap = {k: float(overlap(before[k].encoder_HR, b.encoder_HR)) for k, b in self.bases.items()}
        return self.current

    def _refresh(self, old: Basis, seen: _Sum, metric: _Sum | None) -> Fit:
        if metric is None:
            return refine(old, seen.v_HR, seen.trace)
        return refine(old, seen.v_HR, seen.trace, metric.v_HR, metric.trace, self._ridge)

    def _steered(self, key: Key, version: int, made: Fit, step: float, seen: _Sum | None) -> tuple[BasisMatrix, Basis]:
        """A fit as it travels and as everybody will hold it, with the rank and step that the steering wants, if any."""
        rank = made.encoder_HR.shape[1]
        decision = None
        if seen is not None and key[1] in self._steering and seen.rows and seen.packet_bytes:
            # With `total` for the width, a share's spread is the coefficient's own, whatever the metric.
            shares = [value / made.total for value in made.eigenvalues_R.tolist()]
            window = Window(shares, made.total, seen.packet_bytes / seen.rows, step)
            decision = self._steering[key[1]].decide(window)
            rank, step = decision.rank, decision.step
        basis = Basis(version, made.encoder_HR, made.decoder_RH)
        encoder_HR, decoder_RH = widened(basis, rank)  # as it is, when there are as many
        matrix = _matrix(key, version, encoder_HR[:, :rank], decoder_RH[:rank], step)
        rounded = basis_of(matrix, version, self.spec)  # what rounding broke must not be sent
        if decision is not None:
            self.decisions[key] = decision
        return matrix, rounded

    def _read(self, bases: BasisSet) -> dict[Key, Basis]:
        return {key_of(m, self._boundaries): basis_of(m, bases.version, self.spec) for m in bases.matrices}


class _Sum:
    """What a window's sketches of one boundary, direction and part add up to, over replicas."""

    def __init__(self, v_HR: Tensor, trace: float, rows: int, packet_bytes: int) -> None:
        self.v_HR, self.trace, self.rows, self.packet_bytes = v_HR, trace, rows, packet_bytes

    def __add__(self, other: _Sum) -> _Sum:
        counts = self.rows + other.rows, self.packet_bytes + other.packet_bytes
        return _Sum(self.v_HR + other.v_HR, self.trace + other.trace, *counts)


def _forward(
    stages: Sequence[Stage], mb: Microbatch, draws: int, generator: torch.Generator
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """(h at every boundary, log-probs of the answers, log-probs of labels drawn from the model itself)."""
    assert mb.ids_BT is not None
    boundaries = []
    h_BTH = mb.ids_BT
    for stage in stages:
        h_BTH = stage(h_BTH)
        if stage is not stages[-1]:
            boundaries.append(h_BTH)
    h_MH, weight_VH = completion_rows(h_BTH, mb), stages[-1].lm_head_weight
    logp_M, _ = token_logprobs(h_MH, weight_VH, mb.targets_M)
    drawn = []
    if draws:
        with torch.no_grad():
            probabilities_MV = (h_MH @ weight_VH.T).float().softmax(dim=1)
            labels_MD = torch.multinomial(probabilities_MV, draws, replacement=True, generator=generator)
        drawn = [token_logprobs(h_MH, weight_VH, labels_M.contiguous())[0] for labels_M in labels_MD.T]
    return boundaries, logp_M, drawn


def _accumulate(sums: dict[Key, Tensor], key: Key, part_HH: Tensor) -> None:
    sums[key] = sums[key] + part_HH if key in sums else part_HH


def _most(spec: LinkSpec, direction: Direction) -> int:
    return spec.rank_forward if direction is Direction.FORWARD else spec.rank_backward


def _matrix(key: Key, version: int, encoder_HR: Tensor, decoder_RH: Tensor, step: float) -> BasisMatrix:
    wire_HR, wire_RH = Basis(version, encoder_HR.contiguous(), decoder_RH.contiguous(), step).to_wire()
    return matrix_of(key, wire_HR, wire_RH, step)
