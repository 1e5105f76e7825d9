"""Dynamic gradient gating: scalars in, a verdict out. No tensors; whoever holds lm_head measures the norm.

g_t = ||G_lm||_F^2 is the squared norm of the lm_head gradient of the tick, before clipping and merging. A surge of it
announces collapse from reusing a rollout batch, so the increment d_t = g_t - g_{t-1} is tested against the last W
increments, the current one excluded (Dynamic Gradient Gating, section 5, appendices C and G.2):

    z_t = (d_t - mean) / (std + 1e-8)     population standard deviation
    gated = window full and pass > 1 and z_t > tau

A gated tick is discarded on all stages and ends the reuse of its batch; its increment does not enter the window, but
its g is the last observed one. A g that is not finite is not observed: the tick is skipped for another reason.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swarm_core.learning.errors import GateError

STD_EPSILON = 1e-8
LARGEST_G = 1e150  # beyond it the square of an increment no longer fits a double; no fp32 gradient gets there


@dataclass(frozen=True)
class Verdict:
    """The gate's word on one tick.

    `z` is None until two increments are known (it only gates once the window is `full`). `observed` is False for a g
    that was NaN or infinite (or above 1e150): nothing was learned from it and it never gates; the tick must be
    skipped as non-finite.
    """

    g: float
    pass_index: int
    increment: float | None
    z: float | None
    gated: bool
    full: bool
    observed: bool


class Gate:
    """The sliding statistics of lm_head's gradient energy, and the test.

    `judge` has no effect and can be repeated (a retried tick); `record` makes a verdict part of the history and belongs
    where the tick is decided; `observe` is both. With `enabled=False` everything is measured and nothing is gated.

    Raises: GateError for window < 2, tau not finite, pass < 1, negative g, or a verdict from another state.
    """

    def __init__(self, window: int = 20, tau: float = 0.5, enabled: bool = True) -> None:
        if window < 2:
            raise GateError(f"gate: got window={window}, wanted >= 2 increments for a standard deviation")
        if not math.isfinite(tau):
            raise GateError(f"gate: got tau={tau}, wanted a finite threshold; turn the gate off with enabled=False")
        self.window = window
        self.tau = tau
        self.enabled = enabled
        self._previous: float | None = None
        self._increments: deque[float] = deque(maxlen=window)

    def judge(self, g: float, pass_index: int) -> Verdict:
        """The verdict on `g` (squared Frobenius norm) in pass `pass_index` (1 is the first). Changes nothing."""
        if pass_index < 1:
            raise GateError(f"gate: got pass {pass_index}, wanted >= 1 (the first pass over a batch is pass 1)")
        full = len(self._increments) == self.window
        if math.isnan(g) or g > LARGEST_G:
            return Verdict(g, pass_index, increment=None, z=None, gated=False, full=full, observed=False)
        if g < 0:
            raise GateError(f"gate: got g={g}, wanted a squared norm >= 0")
        increment = None if self._previous is None else g - self._previous
        z = None
        if increment is not None and len(self._increments) >= 2:
            mean = math.fsum(self._increments) / len(self._increments)
            variance = math.fsum((d - mean) ** 2 for d in self._increments) / len(self._increments)
            z = (increment - mean) / (math.sqrt(variance) + STD_EPSILON)
        gated = self.enabled and full and pass_index > 1 and z is not None and z > self.tau
        return Verdict(g, pass_index, increment, z, gated, full, observed=True)

    def record(self, verdict: Verdict) -> None:
        """Make `verdict` part of the history: its g is the last observed, its increment enters unless gated."""
        if not verdict.observed:
            return
        expected = None if self._previous is None else verdict.g - self._previous
        if verdict.increment != expected:
            raise GateError(
                f"gate: got a verdict with increment {verdict.increment}, wanted {expected} from the last observed g "
                f"{self._previous}; judge the tick again before recording it"
            )
        if verdict.increment is not None and not verdict.gated:
            self._increments.append(verdict.increment)
        self._previous = verdict.g

    def observe(self, g: float, pass_index: int) -> Verdict:
        """`judge`, then `record`."""
        verdict = self.judge(g, pass_index)
        self.record(verdict)
        return verdict

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists (JSON); floats survive exactly."""
        return {"window": self.window, "previous_g": self._previous, "increments": list(self._increments)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved history; with a smaller window its newest increments are kept.

        Raises: GateError for missing keys or values that are not finite numbers.
        """
        missing = {"previous_g", "increments"} - set(state)
        if missing:
            raise GateError(
                f"gate state: got keys {sorted(state)}, missing {sorted(missing)}; use state_dict()'s output"
            )
        previous, increments = state["previous_g"], list(state["increments"])
        if not all(math.isfinite(v) for v in increments) or (previous is not None and not math.isfinite(previous)):
            raise GateError("gate state: got values that are not finite, wanted what state_dict() returned")
        self._previous = None if previous is None else float(previous)
        self._increments = deque((float(v) for v in increments), maxlen=self.window)
