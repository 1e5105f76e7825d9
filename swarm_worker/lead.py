"""What stage 0 leads: which batch to order, which round comes next, and how a tick is decided. Sans-I/O, like schedule.py.

The lead owns the data cursor (the next batch number), the plan of passes and slices, the lineage, and the versions of
weights that samplers may ask for. Everything it decides is stamped on frames and written to the journal, so that the
weights are a function of the initial state and the journal.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import Decide, Mode, Order, Outcome
from swarm_worker.schedule import CROSSINGS, Stamp

# Why a tick was skipped, as the journal and the metrics say it.
GATE, NONFINITE, NO_SIGNAL = "gate", "nonfinite", "no_signal"


@dataclass(frozen=True)
class LeadPlan:
    """The knobs of the run that the lead follows (see docs/knobs.md)."""

    ticks: int
    max_reuse: int
    staleness_limit: int
    overlap: bool
    eval_every: int
    checkpoint_every: int
    reference: bool  # a KL penalty needs log-probs of the initial weights
    probe_every: int = 0  # ticks between probes of the links; 0: never
    pin_basis: bool = True  # False: a round takes the newest basis at once, also in the middle of a batch
    k_max: int = 0  # ticks after its snapshot that a correction may still be merged


@dataclass(frozen=True)
class Stock:
    """What the lead must know of a rollout batch: microbatches per slice (0: the slice carries no signal)."""

    batch: int
    weight_version: int
    microbatches: tuple[int, ...]

    @property
    def with_signal(self) -> bool:
        return any(self.microbatches)


@dataclass
class LeadState:
    """Everything that a checkpoint keeps of the lead."""

    epoch: int = 1
    tick: int = 0
    step: int = 0
    lineage: int = 0
    next_batch: int = 0
    published: int = 0
    dropped: int = 0
    current: Stock | None = None
    basis_version: int = 0
    corrections: list[int] = field(default_factory=list)  # versions that every stage has voted to hold
    scored: bool = False
    referenced: bool = False
    plan: list[tuple[int, int]] = field(default_factory=list)  # (pass, slice) still to come, in order

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LeadState:
        data = dict(data)
        if data["current"] is not None:
            stock = data["current"]
            data["current"] = Stock(stock["batch"], stock["weight_version"], tuple(stock["microbatches"]))
        data["plan"] = [(int(p), int(s)) for p, s in data["plan"]]
        return cls(**data)


class Lead:
    """The policy of stage 0. Methods are called by the shell; none blocks, none does I/O."""

    def __init__(self, plan: LeadPlan, state: LeadState | None = None) -> None:
        self.plan = plan
        self.state = state or LeadState()
        self.stop_requested = False
        self.exhausted = False
        self.finished = False
        self._in_stock: Stock | None = None
        self._ordered: int | None = None
        # The tick probed last. Not in the state: a probe changes nothing, and one whose tick was never decided is lost.
        self._probed = -1

    # Rollouts ----------------------------------------------------------------------------------------------------------

    def next_order(self) -> Order | None:
        """The order to give to the sampler now, or None. With overlap one batch is generated while one is trained on."""
        s = self.state
        busy = s.current is not None and not self.plan.overlap
        enough = 0 < self.plan.ticks <= s.tick + len(s.plan)  # the current batch reaches the last tick
        if self._stopping() or busy or enough or self.exhausted:
            return None
        if self._ordered is not None or self._in_stock is not None:
            return None
        self._ordered = s.next_batch
        evaluate = self.plan.eval_every > 0 and s.next_batch % self.plan.eval_every == 0
        return Order(batch=s.next_batch, weight_version=s.published, generate=True, evaluate=evaluate)

    def accept(self, stock: Stock) -> None:
        """Take the batch that was ordered into stock. Raises BadFrame for any other."""
        if stock.batch != self._ordered:
            raise BadFrame(f"batch {stock.batch} arrived; ordered was {self._ordered}")
        self._ordered = None
        self._in_stock = stock

    def sampler_exhausted(self) -> None:
        """The sampler has no batch left (a replay file ended): finish what is there, then stop."""
        self._ordered = None
        self.exhausted = True

    def waiting_for(self) -> str:
        """What the lead waits for between batches, in words; empty when it waits for nothing."""
        if self.state.current is None and self._ordered is not None:
            return f"rollouts of batch {self._ordered}, which a sampler has been asked for"
        return ""

    @property
    def age(self) -> int:
        """Ticks since the weights that generated the current batch."""
        return self.state.tick - self.state.current.weight_version if self.state.current else 0

    # Rounds ------------------------------------------------------------------------------------------------------------

    def next_batch(self, basis_held: int) -> Stock | None:
        """Start on the batch in stock, pinning the newest basis that every stage has reported holding.

        Called before every round: without pinning (`pin_basis`) the next one takes that basis, whatever is under way.
        A batch whose weights are older than the staleness limit at this first use is dropped, counted in `dropped`,
        and will be ordered again with newer ones: a sampler may answer with older weights than it was asked for.
        """
        s = self.state
        if not self.plan.pin_basis:
            s.basis_version = max(s.basis_version, basis_held)
        if s.current is not None or self._in_stock is None or self._stopping():
            return None
        stock, self._in_stock = self._in_stock, None
        if s.tick - stock.weight_version > self.plan.staleness_limit:
            s.dropped += 1
            return None
        # Only now is the batch used up: one that waits in stock at a stop is drawn again after the resume.
        s.next_batch = stock.batch + 1
        s.current, s.scored, s.referenced = stock, False, False
        s.basis_version = max(s.basis_version, basis_held)
        slices = range(len(stock.microbatches))
        passes = self.plan.max_reuse if stock.with_signal else 1
        # A slice without signal is one counted tick without a step; reusing it would teach nothing.
        s.plan = [(p, i) for p in range(1, passes + 1) for i in slices if p == 1 or stock.microbatches[i]]
        return stock

    def next_round(self, corrections: Mapping[int, tuple[int, int]] | None = None) -> Stamp | None:
        """The stamp of the next round of the current batch, or None when there is no batch.

        `corrections` are those that stage 0 holds: (snapshot tick, first tick to merge it in) by version.
        """
        s = self.state
        if s.current is None or self._stopping():
            return None
        if s.current.with_signal:
            everything = sum(s.current.microbatches)
            if self.plan.reference and not s.referenced:
                s.referenced = True
                return self._stamp(Mode.REFERENCE, 0, 0, everything)
            if len(s.plan) > 1 and not s.scored:  # a batch used for one tick only has ratio 1: nothing to score
                s.scored = True
                return self._stamp(Mode.SCORE, 0, 0, everything)
        pass_, index = s.plan[0]
        microbatches = s.current.microbatches[index]
        if self._probed < s.tick and self.plan.probe_every and s.tick % self.plan.probe_every == 0 and microbatches:
            self._probed = s.tick
            return self._stamp(Mode.PROBE, pass_, index, CROSSINGS)
        stamp = self._stamp(Mode.TRAIN, pass_, index, microbatches)
        return replace(stamp, correction=self._newest(corrections or {})) if microbatches else stamp

    def _newest(self, corrections: Mapping[int, tuple[int, int]]) -> int:
        """The newest version whose time has come and not passed; 0: none.

        It never goes back to an older one: what was merged once stays held until something newer is merged, or it is
        too old for good.
        """
        t = self.state.tick
        held = {v: corrections[v] for v in self.state.corrections if v in corrections}
        due = [v for v, (tick, first) in held.items() if first <= t and tick < t <= tick + self.plan.k_max]
        return max(due, default=0)

    def _stamp(self, mode: Mode, pass_: int, index: int, microbatches: int) -> Stamp:
        s = self.state
        assert s.current is not None
        return Stamp(
            epoch=s.epoch,
            tick=s.tick,
            lineage=s.lineage,
            mode=mode,
            batch=s.current.batch,
            pass_=pass_,
            slice=index,
            microbatches=microbatches,
            basis_version=s.basis_version,
            step=s.step,
        )

    # Decisions ---------------------------------------------------------------------------------------------------------

    def decide(self, stamp: Stamp, norms: list[float], coefficient: float, gated: bool) -> Decide:
        """The outcome of a tick all stages have voted on; moves the state on. `coefficient` is the clip coefficient."""
        s = self.state
        if not all(math.isfinite(n) for n in norms):
            outcome, reason = Outcome.SKIP, NONFINITE  # of an empty tick: the score pass before it met NaN
        elif stamp.microbatches == 0:
            outcome, reason = Outcome.SKIP, NO_SIGNAL
        elif gated:
            outcome, reason = Outcome.SKIP, GATE
        else:
            outcome, reason = Outcome.COMMIT, ""
        s.plan.pop(0)
        if reason in (GATE, NONFINITE):
            s.plan.clear()  # old log-probs from a score pass that met NaN would be no better than the gradient
        s.tick += 1
        s.step += outcome is Outcome.COMMIT
        s.lineage = lineage_hash(s.lineage, stamp.epoch, stamp.attempt, outcome)
        end_of_batch = not s.plan
        if end_of_batch:
            s.current = None
            s.published = s.tick
        stop = self._stopping()
        every = self.plan.checkpoint_every
        self.finished = stop
        return Decide(
            outcome=outcome,
            coefficient=coefficient if outcome is Outcome.COMMIT else 0.0,
            end_of_batch=end_of_batch,
            publish=end_of_batch or stop,
            checkpoint=stop or (every > 0 and s.tick % every == 0),
            stop=stop,
            reason=reason,
        )

    def hold(self) -> Decide | None:
        """When the run must end and no tick is under way: save and stop without one."""
        if self.finished or not (self._stopping() or self.exhausted and self.drained):
            return None
        self.finished = True
        return Decide(outcome=Outcome.HOLD, publish=True, checkpoint=True, stop=True)

    @property
    def drained(self) -> bool:
        return self.state.current is None and self._in_stock is None

    def _stopping(self) -> bool:
        return self.stop_requested or 0 < self.plan.ticks <= self.state.tick


def lineage_hash(parent: int, epoch: int, attempt: int, outcome: Outcome) -> int:
    """The next link of the hash chain over decided ticks: equal lineages mean equal histories of outcomes."""
    text = f"{parent}:{epoch}:{attempt}:{int(outcome)}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
