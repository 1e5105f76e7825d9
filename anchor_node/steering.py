"""Adaptive rank and step: how many columns the next basis has and how finely they are rounded. Pure; no tensor.

A closed loop around what a window of packets really cost and captured. Ranks and steps are part of a basis version, so
a decision is pinned to rollout batches with it and no packet ever changes its shape in the middle of one.

With the uniform quantiser a column whose coefficients stay below half a step is rounded to nothing: the step sets both
the rate and the rank that matters. So `bytes_per_token` moves the step, and columns that fell below it are dropped;
`target_share`, of the fit's own measure, moves the rank alone. With both, bytes win.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_CHANGE = 2.0  # of a step in one refresh: the next window says what it did
GROWTH = 1.25  # of a rank whose basis holds no further direction: the power iteration has to find them first
DAMPING = 0.5  # a window is not a whole number of batches, and a batch's first pass costs more than its others
DEAD_BAND = 0.05  # of the budget; steps below it would follow the noise of a window
# What a budget out of reach may drive a step to: finer ones do not fit the integers of a wide model's largest column
# (32767 steps), and coarser ones leave nothing of a row.
FINEST, COARSEST = 1.0 / 64.0, 64.0
KEEP = 0.25  # a column is dropped when its spread is below this share of a step; half a step rounds to nothing


@dataclass(frozen=True)
class Window:
    """What the packets of one boundary and direction were like since the last refresh.

    `shares`: of the rows' energy, in each column of the basis, largest first. `bytes_per_token`: packets over the rows
    that crossed, reuse deltas included. `step` in coefficients of a row of rms 1; 0 without the uniform quantiser.
    """

    shares: Sequence[float]
    width: float
    bytes_per_token: float
    step: float

    @property
    def rank(self) -> int:
        return len(self.shares)


@dataclass(frozen=True)
class Decision:
    """Rank and step of the next version, and why, for the log."""

    rank: int
    step: float
    why: str


@dataclass(frozen=True)
class Steering:
    """The two aims; None switches one off. `most`: the rank that the manifest allows."""

    bytes_per_token: float | None
    target_share: float | None
    most: int

    def decide(self, window: Window) -> Decision:
        """What the next basis version should be like. Without an aim, as the last one."""
        if not window.shares or (self.bytes_per_token is None and self.target_share is None):
            return Decision(window.rank, window.step, "")
        if self.bytes_per_token is not None:
            return self._to_bytes(window, self.bytes_per_token)
        assert self.target_share is not None
        return self._to_share(window, self.target_share)

    def _to_bytes(self, window: Window, aim: float) -> Decision:
        off = window.bytes_per_token / aim
        seen = f"{window.bytes_per_token:.2f} bytes a token, aim {aim:g}"
        if abs(off - 1.0) <= DEAD_BAND:
            return Decision(window.rank, window.step, f"{seen}: kept")
        if window.step == 0.0:  # every column costs the same: the rank is the rate
            rank = max(1, min(self.most, round(window.rank / off)))
            return Decision(rank, 0.0, f"{seen}: rank {window.rank} -> {rank}")
        # Halving the step costs one bit in each column that it leaves something of.
        live = max(1, sum(_spread(share, window.width) >= KEEP * window.step for share in window.shares))
        change = 2.0 ** (DAMPING * 8.0 * (window.bytes_per_token - aim) / live)
        wanted = window.step * min(MOST_CHANGE, max(1.0 / MOST_CHANGE, change))
        step = min(COARSEST, max(FINEST, wanted))
        rank = self._worth_it(window, step)
        return Decision(rank, step, f"{seen}: step {window.step:.3g} -> {step:.3g}, rank {window.rank} -> {rank}")

    def _to_share(self, window: Window, aim: float) -> Decision:
        captured, enough = 0.0, None
        for column, share in enumerate(window.shares, start=1):
            captured += share
            if enough is None and captured >= aim:
                enough = column
        seen = f"captured share {captured:.3f}, aim {aim:g}"
        grown = min(self.most, max(window.rank + 1, math.ceil(window.rank * GROWTH)))
        rank = grown if enough is None else enough
        return Decision(rank, window.step, f"{seen}: rank {window.rank} -> {rank}")

    def _worth_it(self, window: Window, step: float) -> int:
        """The columns that a step leaves something of; more than now when even the last one is well above it."""
        spreads = [_spread(share, window.width) for share in window.shares]
        if spreads[-1] > step:
            return min(self.most, math.ceil(window.rank * GROWTH))
        return max(1, sum(spread >= KEEP * step for spread in spreads))


def _spread(share: float, width: float) -> float:
    """Root mean square of a column's coefficients, for rows of rms 1: their energy is the width."""
    return math.sqrt(max(share, 0.0) * width)
