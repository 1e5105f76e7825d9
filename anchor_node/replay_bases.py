"""Bases out of the anchor's own replay: moments of what it sends over each boundary, and the pairs that fit them.

With `anchor.q_source = anchor_replay` the stages sketch nothing. The replay (dense_replay.py) shows h and dL/dh at every
boundary of a tick that was, so that C and G (codec/fit.py) stand in one place and the pair is solved for exactly: no
warm start, and columns in the order of the moments' eigenvalues. But a replay shows one slice, where stages see all of
their window's ticks, and an exact fit follows the noise of few rows. So moments are remembered, and none is solved that
has seen less than ENOUGH rows a column. On the tiny example, a slice (6 rows a column) a refresh, after 13: a policy's
KL through the links is 0.0043 without memory, 0.0007 with it and with the stages' sketches.

A model whose H x H moments are too large sums the sketches that stages would have sent, against the version in use, and
takes the same warm step. That has no memory but the basis itself: sums against another basis mean nothing.

Suffixes: U rows of a microbatch that cross, N those looked at, H hidden width, R columns of a basis.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from anchor_node.calibrator import METRIC, MOMENT, BasisKeeper
from codec.basis import Basis
from codec.errors import SpecError
from codec.fit import Fit, FitName, fit_pair, metric_weights, moment, moment_weights, refine, sketch
from codec.spec import Direction
from swarm_core.wire.bases import Key

WIDEST = 2048  # a pair of this width is solved for in 9 s on one core, and the time goes with the cube
ROWS = 1024  # of a microbatch: at the widest, 0.2 s a moment on one core
MEMORY = 0.8  # of the moments, from one refresh to the next: half of what counts is of the last three
ENOUGH = 16  # rows a column of the moment
log = logging.getLogger(__name__)


class ReplayBases:
    """The window of replays that the keeper's next version is made of. One thread, the replay's, calls it.

    A window keeps the bases that it began with: their ranks, and what a wide model's sketches are taken against.
    """

    def __init__(
        self, keeper: BasisKeeper, cadence: int, fit: FitName = "plain", ridge: float = 0.03, outliers: float = 0.0
    ) -> None:
        """`cadence` is `anchor.q_cadence` in ticks; `fit`, `ridge` and `outliers` are the knobs of [links]."""
        self._keeper = keeper
        self._cadence = cadence
        self._fit: FitName = fit
        self._ridge, self._outliers = ridge, outliers
        self._bases: Mapping[Key, Basis] = {}
        self._window: dict[tuple[Key, int], _Sum] = {}
        self._memory: dict[tuple[Key, int], _Sum] = {}

    def watch(self, boundary: int, h_UH: Tensor, grad_UH: Tensor) -> None:
        """Rows that cross a boundary and the loss' gradient in them, as the replay shows them. NaN leaves no trace."""
        if not self._window:
            self._bases = self._keeper.bases
        every = -(-len(h_UH) // ROWS) or 1
        h_NH, grad_NH = (t.detach()[::every].to("cpu", torch.float32) for t in (h_UH, grad_UH))
        try:
            sums = {}
            for direction, x_NH in ((Direction.FORWARD, h_NH), (Direction.BACKWARD, grad_NH)):
                basis = self._bases.get((boundary, direction))
                if basis is None:  # `exact` links have one basis for both directions
                    continue
                weights_N = moment_weights(x_NH, direction, self._fit, self._outliers)
                sums[((boundary, direction), MOMENT)] = _sum(x_NH, basis.encoder_HR, weights_N)
                if self._fit == "metric" and direction is Direction.FORWARD:
                    weights_N = metric_weights(h_NH, grad_NH, self._outliers)
                    sums[((boundary, direction), METRIC)] = _sum(grad_NH, basis.decoder_RH.T, weights_N)
        except SpecError as error:
            log.warning("what a replay showed of boundary %d is left out of the next basis: %s", boundary, error)
            return
        for key, one in sums.items():
            self._window[key] = self._window[key].plus(one) if key in self._window else one

    def solve(self, tick: int) -> dict[Key, Fit]:
        """After the replay of a tick: the pairs of the next version for `BasisKeeper.adopt`; {} when none is due.

        One is due at the first replay in each `cadence` ticks, as stages end their windows, that has shown enough. Ranks
        are those in use. A boundary without enough rows, or whose rows give no pair, is left out. It takes seconds on a
        wide model.
        """
        version, made = self._keeper.version, self._keeper.current.tick
        if (tick + 1) // self._cadence <= ((made + 1) // self._cadence if version else 0) or not self._window:
            return {}
        seen = self._seen()
        shown = [at for (at, part), one in seen.items() if part == MOMENT and one.rows >= ENOUGH * len(one.total)]
        if not shown:
            return {}
        fits = {}
        for key in sorted(shown):
            try:
                fits[key] = self._pair(self._bases[key], seen[(key, MOMENT)], seen.get((key, METRIC)))
            except (SpecError, torch.linalg.LinAlgError) as error:
                log.warning("boundary %d, %s, gets no basis of a replay: %s", key[0], key[1].name.lower(), error)
        self._window = {}
        self._memory = {key: one.faded() for key, one in seen.items() if len(one.total) <= WIDEST}
        return fits

    def _seen(self) -> dict[tuple[Key, int], _Sum]:
        """The window on top of what is remembered. Gradients shrink and grow over a run: there, rows count alike."""
        seen = dict(self._memory)
        for key, one in self._window.items():
            if one.trace > 0:
                seen[key] = seen[key].plus(one.a_row_each()) if key in seen else one.a_row_each()
        return seen

    def _pair(self, old: Basis, seen: _Sum, metric: _Sum | None) -> Fit:
        if old.width <= WIDEST:
            return fit_pair(seen.total, None if metric is None else metric.total, old.rank, self._ridge)
        if metric is None:
            return refine(old, seen.total, seen.trace)
        return refine(old, seen.total, seen.trace, metric.total, metric.trace, self._ridge)


class _Sum(NamedTuple):
    """A moment, H x H, or on a wide model its sketch, H x R; the moment's trace, and the rows that it is of."""

    total: Tensor
    trace: float
    rows: float

    def plus(self, other: _Sum) -> _Sum:
        return _Sum(self.total + other.total, self.trace + other.trace, self.rows + other.rows)

    def a_row_each(self) -> _Sum:
        """Scaled to a trace of 1 a row."""
        return _Sum(self.total * (self.rows / self.trace), self.rows, self.rows)

    def faded(self) -> _Sum:
        return _Sum(self.total * MEMORY, self.trace * MEMORY, self.rows * MEMORY)


def _sum(x_NH: Tensor, basis_HR: Tensor, weights_N: Tensor | None) -> _Sum:
    """Of one microbatch. Raises SpecError for rows that are no numbers."""
    if x_NH.shape[1] <= WIDEST:
        moment_HH = moment(x_NH, weights_N)
        return _Sum(moment_HH, float(moment_HH.trace()), len(x_NH))
    v_HR = sketch(x_NH, basis_HR, weights_N)
    square_N = torch.linalg.vector_norm(x_NH, dim=1, dtype=torch.float64).square()
    trace = float((square_N if weights_N is None else square_N * weights_N).sum())
    if not (math.isfinite(trace) and bool(torch.isfinite(v_HR).all())):
        raise SpecError("rows of a replay", f"a sum of {trace}", "finite rows")
    return _Sum(v_HR, trace, len(x_NH))
