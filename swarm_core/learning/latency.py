"""When the anchor's snapshots are taken and when what is made of them is due: numbers only, no tensor, clock or file.

Pure functions of tick, seed and knobs, so that every process works out the same schedule by itself. Snapshot ticks s
give correction *versions* 1, 2, ... in order; the latency K of one is the least age at which its correction may be
merged, so it is due (*fires*) in tick s + K. For a fixed K and cadence m, s = -K mod m: fires are multiples of m
(METHOD section 2). Otherwise s = 0 mod m, and K is drawn for each snapshot.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from swarm_core.learning.errors import UnfitError

LatencyKind = Literal["natural", "fixed", "uniform", "lognormal", "trace"]

# A lognormal K has no largest value, but a ring has a size: draws above 3 standard deviations (0.13 %) count as 3.
LOGNORMAL_REACH = 3.0
LARGEST_K = 999_999_999  # of a trace: far above any run, and int() of a digit more stays cheap


class LatencyError(UnfitError):
    """A latency or schedule that cannot be."""


@dataclass(frozen=True)
class Latency:
    """The distribution of K, in ticks.

    natural: 0, as soon as it is there. fixed: `delay_k`. uniform: `low` to `high`, both included. lognormal: delay_k
    exp(sigma N), rounded, at least 1, N a standard normal cut off at 3. trace: its entries, snapshot by snapshot, over
    and over.
    """

    kind: LatencyKind = "natural"
    delay_k: int = 5
    low: int = 1
    high: int = 20
    sigma: float = 0.5
    trace: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        kinds = ("natural", "fixed", "uniform", "lognormal", "trace")
        _require(self.kind in kinds, "anchor.latency", self.kind, ", ".join(kinds))
        _require(self.delay_k >= 1, "anchor.delay_k", self.delay_k, ">= 1 tick")
        _require(1 <= self.low <= self.high, "anchor.latency_range", [self.low, self.high], "1 <= least <= most")
        _require(0 <= self.sigma <= 10, "anchor.latency_sigma", self.sigma, "0 <= sigma <= 10")
        if self.kind == "trace":
            _require(bool(self.trace) and min(self.trace) >= 1, "anchor.latency_trace", self.trace, "entries >= 1")

    def draw(self, tick: int, index: int | None = None) -> int:
        """K of the snapshot of `tick`: a pure function of (seed, tick), whatever was drawn before.

        `index` is the snapshot's number in the schedule, from 0; a trace needs it (`FireSchedule` passes it).
        """
        match self.kind:
            case "natural":
                return 0
            case "fixed":
                return self.delay_k
            case "uniform":
                return self.low + int(self._unit(tick) * (self.high - self.low + 1))
            case "lognormal":
                return self._lognormal(NormalDist().inv_cdf(max(self._unit(tick), 2.0**-54)))
        _require(index is not None, "snapshot index of a trace", index, "its number from 0", "ask FireSchedule")
        assert index is not None
        return self.trace[index % len(self.trace)]

    @property
    def largest(self) -> int:
        """The largest K that `draw` can give."""
        match self.kind:
            case "natural":
                return 0
            case "fixed":
                return self.delay_k
            case "uniform":
                return self.high
            case "lognormal":
                return self._lognormal(LOGNORMAL_REACH)
        return max(self.trace)

    def _unit(self, tick: int) -> float:
        # A text seed is hashed (SHA-512) and random() is promised to stay the same over Python versions.
        return random.Random(f"anchor latency/{self.seed}/{tick}").random()

    def _lognormal(self, normal: float) -> int:
        return max(1, round(self.delay_k * math.exp(self.sigma * min(normal, LOGNORMAL_REACH))))


@dataclass(frozen=True)
class FireSchedule:
    """Which ticks are snapshot ticks and when they fire, for cadence m = `cadence` ticks (`anchor.m_cadence`)."""

    cadence: int
    latency: Latency

    def __post_init__(self) -> None:
        _require(self.cadence >= 1, "anchor.m_cadence", self.cadence, ">= 1 tick")

    @property
    def first(self) -> int:
        """The first snapshot tick."""
        return -self.latency.delay_k % self.cadence if self.latency.kind == "fixed" else 0

    def count_before(self, tick: int) -> int:
        """Snapshot ticks before `tick`, which is also the newest version from before it (0: none)."""
        return max(0, -(-(tick - self.first) // self.cadence))

    def version_at(self, tick: int) -> int:
        """The version of the snapshot of `tick`; 0 when that is not a snapshot tick."""
        if tick < self.first or (tick - self.first) % self.cadence:
            return 0
        return (tick - self.first) // self.cadence + 1

    def tick_of(self, version: int) -> int:
        """s of `version` (from 1): the inverse of `version_at`."""
        _require(version >= 1, "correction version", version, ">= 1", "0 stands for none")
        return self.first + (version - 1) * self.cadence

    def fire_tick(self, version: int) -> int:
        """s + K: the first tick that may merge the correction of `version`."""
        tick = self.tick_of(version)
        return tick + self.latency.draw(tick, version - 1)

    def not_before(self, version: int, taken: int) -> int:
        """The first tick that may merge the correction of a snapshot taken in tick `taken`: later than its own tick of the
        schedule where that was skipped, and its K counts from there. Never the tick itself."""
        return taken + max(1, self.fire_tick(version) - self.tick_of(version))

    def most_pairs(self) -> int:
        """Pairs of weights and rollouts that must fit at once: those from s until s + K has passed, for the largest K
        that can be drawn, and one that is under replay beyond that (the anchor may be slower than K)."""
        return self.latency.largest // self.cadence + 2


def read_trace(text: str, name: str = "anchor.latency_trace") -> tuple[int, ...]:
    """The text of a trace file: a K >= 1 a line; empty lines and what follows a # do not count.

    Raises: LatencyError, which names the line.
    """
    trace = []
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        plain = entry.isascii() and entry.isdigit() and len(entry) <= len(str(LARGEST_K))
        wanted = f"a whole number of ticks from 1 to {LARGEST_K}"
        _require(plain and int(entry) >= 1, f"{name}, line {number}", repr(entry[:40]), wanted, "a K a line")
        trace.append(int(entry))
    _require(bool(trace), name, "no entry", "at least one", "a K a line")
    return tuple(trace)


def _require(holds: bool, what: str, got: object, wanted: str, todo: str = "change the [anchor] section") -> None:
    if not holds:
        raise LatencyError(what, got, wanted, todo)
