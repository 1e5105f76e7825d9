"""What a simulated swarm is measured by: the world it lives in, and a referee with books of its own. No clock, no shell.

What a batch holds and how a tick ends is a function of the seed alone (`World`), so that runs under other clocks, or
with a stop and a resume, can be compared. `Referee` objects (AssertionError) to anything that a correct run never does.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from swarm_core.wire.messages import Decide, Mode, Outcome
from swarm_worker.lead import LeadPlan
from swarm_worker.schedule import Compute, Op, Stamp


@dataclass(frozen=True)
class World:
    """Everything that does not depend on the clock."""

    seed: int
    stages: int
    plan: LeadPlan
    ticks_per_pass: int
    batches: int  # the sampler has no more
    losing: float = 0.1  # share of a tick's activations that refer to rows which their receiver has lost

    def _draw(self, *what: object) -> random.Random:
        return random.Random(f"{self.seed} {what}")

    def microbatches(self, batch: int) -> tuple[int, ...]:
        draw = self._draw("sizes", batch)
        if draw.random() < 0.15:
            return (0,) * self.ticks_per_pass
        return tuple(draw.choice((0, 1, 1, 2, 3, 5, 7)) for _ in range(self.ticks_per_pass))

    def verdict(self, batch: int, pass_: int, index: int) -> tuple[bool, bool]:
        """(gated, not finite) of a tick."""
        draw = self._draw("verdict", batch, pass_, index)
        return pass_ > 1 and draw.random() < 0.2, draw.random() < 0.12

    def probed(self, tick: int, microbatches: int) -> bool:
        """Whether a probe comes before a tick."""
        return microbatches > 0 and self.plan.probe_every > 0 and tick % self.plan.probe_every == 0

    def loses(self, stage: int, stamp: Stamp, microbatch: int) -> bool:
        """Whether a receiver cannot make sense of an activation when it first comes."""
        draw = self._draw("lost", stage, stamp.batch, stamp.pass_, stamp.slice, microbatch)
        return stage > 0 and stamp.mode is Mode.TRAIN and draw.random() < self.losing

    def too_old(self, batch: int) -> bool:
        """Whether the first delivery of a batch comes from weights that are too old."""
        return self._draw("old", batch).random() < 0.15


def make_world(seed: int) -> World:
    draw = random.Random(seed)
    ticks_per_pass, max_reuse = draw.randint(1, 3), draw.randint(1, 4)
    plan = LeadPlan(
        ticks=draw.choice((0, 1, 5, 9, 14)),
        max_reuse=max_reuse,
        staleness_limit=ticks_per_pass * max_reuse,
        overlap=draw.random() < 0.5,
        eval_every=draw.randint(0, 3),
        checkpoint_every=draw.randint(0, 4),
        reference=draw.random() < 0.3,
        probe_every=random.Random(f"probe {seed}").randint(0, 3),
    )
    return World(seed, draw.randint(1, 5), plan, ticks_per_pass, batches=draw.randint(0, 4))


@dataclass
class Seen:
    """What one stage has done in one round."""

    stamp: Stamp
    forwards: int = 0
    backwards: int = 0
    lost: set[int] = field(default_factory=set)
    resent: set[int] = field(default_factory=set)
    compared: bool = False
    tallied: bool = False
    voted: bool = False
    over: bool = False


@dataclass
class Referee:
    """Objects to what a correct run never does. Knows nothing of the schedule's inside."""

    stages: int
    rounds: list[dict[tuple[Any, ...], Seen]] = field(init=False)
    applied: list[list[tuple[int, Decide]]] = field(init=False)
    unsent: list[int] = field(init=False)
    happened: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rounds = [{} for _ in range(self.stages)]
        self.applied = [[] for _ in range(self.stages)]
        self.unsent = [0] * self.stages

    def begins(self, stage: int, stamp: Stamp) -> None:
        assert stamp.key not in self.rounds[stage], "the same round twice"
        if any(not seen.over for seen in self.rounds[stage].values()):
            self.happened["begun early"] += 1
        self.rounds[stage][stamp.key] = Seen(stamp)

    def computes(self, stage: int, command: Compute) -> None:
        if command.op is Op.APPLY:
            return self._applies(stage, command)
        seen = self.rounds[stage][command.stamp.key]
        open_rounds = [other for other in self.rounds[stage].values() if not other.over]
        assert seen is open_rounds[0], f"stage {stage} works on a round before the one ahead of it is over"
        last, mode = stage == self.stages - 1, command.stamp.mode
        learns = mode in (Mode.TRAIN, Mode.PROBE)
        match command.op:
            case Op.FORWARD | Op.SCORE | Op.LOSS:
                assert (command.op is Op.SCORE) == (not learns), f"{command.op} in a {mode.name} round"
                assert not learns or (command.op is Op.LOSS) == last
                assert command.microbatch == seen.forwards, f"stage {stage}: forward out of order"
                seen.forwards += 1
                seen.backwards += command.op is Op.LOSS
                flying = seen.forwards - seen.backwards
                if learns:
                    assert flying <= self.stages - stage, f"stage {stage}: {flying} microbatches in flight"
                    self.happened["in flight at the bound"] += flying == self.stages - stage and stage < self.stages - 2
            case Op.BACKWARD:
                assert learns, "a score round makes gradients"
                assert command.microbatch == seen.backwards, f"stage {stage}: backward out of order"
                seen.backwards += 1
                assert seen.backwards <= seen.forwards
            case Op.RESEND:
                below = self.rounds[stage + 1][command.stamp.key]
                assert command.microbatch in below.lost - seen.resent, "sent again what nobody lost, or twice"
                assert seen.backwards <= command.microbatch < seen.forwards
                seen.resent.add(command.microbatch)
                self.happened["resent"] += 1
                self.happened["resent after the last forward"] += seen.forwards == command.stamp.microbatches > 1
            case Op.COMPARE:
                assert mode is Mode.PROBE and not seen.compared
                assert seen.forwards == seen.backwards == command.stamp.microbatches == 2, (
                    "compared before both are there"
                )
                seen.compared = True
                self.happened["probed"] += 1
            case Op.TALLY:
                assert mode is Mode.TRAIN and not seen.tallied, f"stage {stage} tallies twice, or what is no tick"
                assert seen.forwards == seen.backwards == command.stamp.microbatches, "tallied before all gradients"
                seen.tallied = True
        return None

    def loses(self, stage: int, command: Compute) -> None:
        """What was begun has come to nothing."""
        seen = self.rounds[stage][command.stamp.key]
        seen.lost.add(command.microbatch)
        seen.forwards -= 1
        seen.backwards -= command.op is Op.LOSS

    def holds_back(self, stage: int, change: int) -> None:
        """An activation was computed (+1), or taken by the link (-1)."""
        self.unsent[stage] += change
        assert 0 <= self.unsent[stage] <= 2 * self.stages, f"stage {stage}: {self.unsent[stage]} activations unsent"
        self.happened["credit used up"] += self.unsent[stage] == 2 * self.stages

    def votes(self, stage: int, stamp: Stamp) -> None:
        seen = self.rounds[stage][stamp.key]
        assert seen.tallied and not seen.voted, f"stage {stage} votes before its tally, or twice"
        seen.voted = True
        below = [self.rounds[i][stamp.key].voted for i in range(stage + 1, self.stages)]
        assert all(below), f"stage {stage} votes before the stages below it"

    def _applies(self, stage: int, command: Compute) -> None:
        assert command.decide is not None, "applied without a decision"
        if command.decide.outcome != Outcome.HOLD:
            for i in range(self.stages):
                assert self.rounds[i][command.stamp.key].voted, f"stage {stage} applies before stage {i} has voted"
        self.applied[stage].append((command.stamp.tick, command.decide))
        ahead = self.applied[0][: len(self.applied[stage])]
        assert self.applied[stage] == ahead, f"stage {stage} applies another decision than stage 0"

    def finishes(self, stage: int, stamp: Stamp) -> None:
        if stamp.key not in self.rounds[stage]:
            return  # a HOLD
        seen = self.rounds[stage][stamp.key]
        assert not seen.over and seen.forwards == stamp.microbatches
        assert seen.backwards == (stamp.microbatches if stamp.mode in (Mode.TRAIN, Mode.PROBE) else 0)
        assert seen.compared == (stamp.mode is Mode.PROBE), f"stage {stage} ends a probe without its comparison"
        seen.over = True
