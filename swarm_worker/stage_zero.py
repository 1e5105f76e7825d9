"""Stage 0's part beside its layers: rollouts in, batches and stamps out, votes to decisions, one metrics row a tick.

The policy is lead.py; this file joins it to data. No socket here: the worker sends what is returned.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch

from swarm_core.config import RunConfig
from swarm_core.learning import optimizer as optim
from swarm_core.learning.batch import Batch, make_batch
from swarm_core.learning.errors import RolloutError
from swarm_core.learning.grpo import LossSpec
from swarm_core.learning.merge import measures
from swarm_core.learning.rollout import RolloutBatch, reward_metrics, slices, to_samples
from swarm_core.manifest import Manifest
from swarm_core.run_folder import checkpoint_name
from swarm_core.wire.messages import Decide, Order, Outcome, Report, Rollouts, StageVote
from swarm_worker.compute import optimizer_spec
from swarm_worker.correcting import SUMS, summed
from swarm_worker.fidelity import POISONED, PREFIX
from swarm_worker.journal import Journal
from swarm_worker.lead import Lead, LeadPlan, LeadState, Stock
from swarm_worker.sampler.replay import ReplayWriter
from swarm_worker.schedule import ProtocolError, Stamp
from swarm_worker.voting import ANCHOR_WAIT

log = logging.getLogger(__name__)


def lead_plan(manifest: Manifest) -> LeadPlan:
    """The lead's knobs out of the manifest."""
    config = manifest.config
    return LeadPlan(
        ticks=config.run.ticks,
        max_reuse=config.grpo.max_reuse,
        staleness_limit=config.grpo.staleness_limit,
        overlap=config.sampler.overlap,
        eval_every=config.sampler.eval_every if config.data.validation else 0,
        checkpoint_every=config.checkpoint.every,
        reference=config.grpo.kl_beta > 0,
        pin_basis=config.anchor.pin_basis,
        k_max=config.corrections.k_max,
        probe_every=config.links.fidelity_every if manifest.boundaries else 0,
    )


class StageZero:
    """What stage 0 knows beyond its layers."""

    def __init__(
        self,
        manifest: Manifest,
        loss_spec: LossSpec,
        dtype: torch.dtype,
        journal: Journal,
        state: LeadState,
        record: ReplayWriter | None,
        stats: dict[int, dict[str, float]],
    ) -> None:
        """`state` and `stats` (reward metrics by batch) are those of the checkpoint that a run resumes from."""
        self.manifest = manifest
        self.lead = Lead(lead_plan(manifest), state)
        self._loss_spec = loss_spec
        self._optimizer_spec = optimizer_spec(manifest.config)
        self._dtype = dtype
        self._journal = journal
        self._record = record
        self._stock: Batch | None = None
        self._rollouts: RolloutBatch | None = None
        self._stats = stats
        self.kept: dict[int, Rollouts] = {}  # delivered in an earlier epoch, and not trained on yet
        self._last_decision = time.monotonic()

    def ending(self) -> tuple[Report, Order | None]:
        """After the last decision: tell the anchor that the run ends, and order an evaluation of the final weights."""
        lead, config = self.lead, self.manifest.config
        evaluate = config.data.validation is not None and not lead.stop_requested
        if lead.stop_requested:
            message = "stopped on request"
        elif lead.exhausted:
            message = "the recorded rollouts are used up"
        else:
            message = f"all {lead.plan.ticks} ticks are done"
        report = self._event("finished", message)
        report.words["evaluation"] = "yes" if evaluate else "no"
        report.words["checkpoint"] = checkpoint_name(lead.state.tick)
        order = Order(batch=lead.state.next_batch, weight_version=lead.state.tick, evaluate=True)
        return report, order if evaluate else None

    def take_rollouts(self, rollouts: RolloutBatch) -> None:
        """A batch arrived: into stock with it. Raises LearningError when it is not of the size that was ordered."""
        config = self.manifest.config
        wanted = (config.grpo.prompts_per_batch, config.grpo.completions_per_prompt)
        if (rollouts.groups, rollouts.group_size) != wanted:
            got = f"{rollouts.groups} prompts x {rollouts.group_size} completions"
            raise RolloutError(rollouts.batch, None, f"got {got}, wanted {wanted[0]} x {wanted[1]}")
        batch, stock = batch_of(rollouts, config, self._loss_spec)
        self.lead.accept(stock)
        self._stock, self._rollouts = batch, rollouts
        self._stats[batch.number] = reward_metrics(rollouts)

    def next_batch(self, basis_held: int) -> tuple[Batch | None, Report | None]:
        """(the batch in stock, when the lead starts on it; an event, when it was too old and was dropped)."""
        dropped = self.lead.state.dropped
        if self.lead.next_batch(basis_held) is None:
            if self.lead.state.dropped == dropped:
                return None, None
            assert self._stock is not None
            age, limit = self.lead.state.tick - self._stock.weight_version, self.lead.plan.staleness_limit
            text = f"batch {self._stock.number}: its weights are {age} ticks old, over {limit}"
            return None, self._event("dropped_batch", text)
        batch, self._stock = self._stock, None
        assert batch is not None
        if self._record is not None and self._rollouts is not None:
            self._record.append(self._rollouts)  # exactly the batches that are trained on, in order
        self._stats = {n: s for n, s in self._stats.items() if n >= batch.number}
        return batch, None

    def decide(self, stamp: Stamp, votes: list[StageVote], gated: bool, tokens: int) -> tuple[Decide, Report]:
        """Decide a tick that every stage has voted on, journal it, and sum it up in a metrics row."""
        votes = sorted(votes, key=lambda vote: vote.stage)
        if [vote.stage for vote in votes] != list(range(self.manifest.stages)):
            raise ProtocolError(f"votes of stages {[vote.stage for vote in votes]}, wanted one of each")
        norms = [norm for vote in votes for norm in vote.norms]
        total = optim.total_norm(norms, self._dtype) if all(vote.ready for vote in votes) else math.inf
        coefficient = optim.clip_coefficient(norms, self.manifest.config.optimizer.max_grad_norm, self._dtype)
        age = self.lead.age
        self.lead.state.corrections = sorted(set.intersection(*(set(vote.corrections_held) for vote in votes)))
        decide = self.lead.decide(stamp, [*norms, total], coefficient, gated)
        fault = _fault(stamp, votes)
        if fault:
            log.warning("tick %d is skipped: %s", stamp.tick, fault)
        self._journal.write(stamp, decide, total, fault)
        now = time.monotonic()
        tick_s, self._last_decision = now - self._last_decision, now
        numbers: dict[str, float] = {
            "batch": stamp.batch,
            "pass": stamp.pass_,
            "slice": stamp.slice,
            "step": stamp.step,
            "tick_s": tick_s,
            "tokens": tokens,
            "tokens_per_s": tokens / max(tick_s, 1e-9),
            "grad_norm": total,
            "lr": optim.learning_rate(self._optimizer_spec, stamp.step),
            "dropped_batches": self.lead.state.dropped,
            "staleness": age,
            "dgg/gated": float(gated),
            "basis/version": stamp.basis_version,
            "microbatches": stamp.microbatches,
        }
        numbers |= self._stats.get(stamp.batch, {})
        for vote in votes:
            numbers |= {name: value for name, value in vote.numbers.items() if not name.startswith(SUMS)}
        if (merged := summed([vote.numbers for vote in votes])) is not None:
            numbers |= measures(merged)
        waits = (value for vote in votes for name, value in vote.numbers.items() if name.startswith(ANCHOR_WAIT))
        numbers[ANCHOR_WAIT] = sum(waits, 0.0)
        if POISONED in numbers:  # zeros travelled on from there, so what other stages compared means nothing
            numbers = {n: value for n, value in numbers.items() if n == POISONED or not n.startswith(PREFIX)}
        words = {"outcome": Outcome(decide.outcome).name.lower(), "skip_reason": decide.reason}
        if fault:
            words["fault"] = fault
        return decide, Report(type="tick", tick=stamp.tick, numbers=numbers, words=words)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {"lead": self.lead.state.to_json(), "stats": {str(n): stats for n, stats in self._stats.items()}}

    def _event(self, name: str, message: str) -> Report:
        return Report(type="event", tick=self.lead.state.tick, words={"event": name, "message": message})


def _fault(stamp: Stamp, votes: list[StageVote]) -> str:
    """Where NaN or Inf was caught in a tick, in words: by a sender, or else in a gradient. Empty: nowhere."""
    said = [vote.fault or f"stage {vote.stage}, tick {stamp.tick}: not ready" for vote in votes if not vote.ready]
    if said:
        return "; ".join(said)
    for vote in votes:
        bad = [i for i, norm in enumerate(vote.norms) if not math.isfinite(norm)]
        if bad:
            several = f"{len(bad)} of {len(vote.norms)} tensors, the first number {bad[0]}"
            return f"stage {vote.stage}, tick {stamp.tick}: the gradient is not finite in {several}"
    return ""


def batch_of(rollouts: RolloutBatch, config: RunConfig, spec: LossSpec) -> tuple[Batch, Stock]:
    """(the batch as stage 0 holds it, what the lead must know of it)."""
    cut = slices(rollouts, config.grpo.ticks_per_pass)
    samples, tokens, sequences = [], [], []
    for part in cut:
        kept, stats = to_samples(part, spec)
        samples.append(kept)
        tokens.append(stats.denominators.tokens)
        sequences.append(stats.denominators.sequences)
    batch = make_batch(
        rollouts.batch,
        rollouts.weight_version,
        samples,
        tokens,
        sequences,
        config.swarm.microbatch_size,
        keep_groups=config.links.shares_prompts,
    )
    return batch, Stock(batch.number, batch.weight_version, batch.microbatches)
