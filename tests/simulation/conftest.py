"""The real schedule and lead of 1 to 5 stages under a virtual clock, with random durations, links and a sampler.

`Swarm` is a small shell around `Schedule` and `Lead`, as worker.py is: frames become events, commands are carried out.
What it may do, referee.py says.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from referee import Referee, World, make_world

from swarm_core.wire.messages import Decide, Mode, Order, Outcome
from swarm_worker.headers import Position
from swarm_worker.lead import Lead, LeadState, Stock
from swarm_worker.schedule import (
    ActivationCame,
    AskAgain,
    Begun,
    CastVote,
    Compute,
    Computed,
    Decided,
    Event,
    Finished,
    GradientCame,
    Lost,
    Op,
    ResendAsked,
    Schedule,
    Sent,
    Stamp,
    VoteCame,
)

MOST_EVENTS = 60_000  # the longest scenario needs a tenth


class Link:
    """One direction between neighbours: takes frame after frame, delivers in order."""

    def __init__(self, swarm: Swarm, take_s: float, latency_s: float) -> None:
        self.swarm, self.take_s, self.latency_s = swarm, take_s, latency_s
        self.free_at = self.arrival = 0.0

    def post(self, deliver: Callable[[], None], taken: Callable[[], None] | None = None, size: float = 0.0) -> None:
        rng = self.swarm.rng
        self.free_at = max(self.free_at, self.swarm.now) + size * self.take_s * rng.random()
        self.arrival = max(self.arrival, self.free_at + self.latency_s * rng.random())
        if taken is not None:
            self.swarm.at(self.free_at, taken)
        self.swarm.at(self.arrival, deliver)


Ballot = tuple[float, int, int | None]  # norm, basis held, tick of the probe reported


class Node:
    """One stage: what worker.py does, without tensors or sockets."""

    def __init__(self, swarm: Swarm, stage: int, position: Position) -> None:
        self.swarm, self.stage = swarm, stage
        self.schedule = Schedule(stage, swarm.world.stages)
        self.position = position
        self.next_lineage = position.lineage
        self.basis = swarm.lead.state.basis_version
        self.arrived: set[tuple[Any, ...]] = set()
        self.lost: set[tuple[Any, ...]] = set()
        self.compared: int | None = None  # the tick whose probe is to be reported in the next vote
        self.below_voted: tuple[list[Ballot], bool] = ([], False)

    def drive(self, event: Event) -> None:
        referee = self.swarm.referee
        for command in self.schedule.handle(event):
            match command:
                case Compute():
                    referee.computes(self.stage, command)
                    self._take_input(command)
                    self.swarm.later(self.swarm.speed[self.stage], lambda c=command: self._computed(c))
                case AskAgain(stamp, microbatch):
                    self._ask_again(stamp, microbatch)
                case CastVote(stamp):
                    referee.votes(self.stage, stamp)
                    self._vote(stamp)
                case Finished(stamp):
                    referee.finishes(self.stage, stamp)
                    if self.stage == 0:
                        self.swarm.round_active = False
        if self.stage == 0 and self.schedule.idle:
            self.swarm.advance()

    def _take_input(self, command: Compute) -> None:
        what = (command.stamp.key, command.microbatch, command.op is Op.BACKWARD)
        forward = command.op in (Op.FORWARD, Op.LOSS, Op.SCORE)
        if command.op is Op.BACKWARD or forward and self.stage > 0:
            assert what in self.arrived, f"stage {self.stage} computes on {what}, which is not there"
            self.arrived.remove(what)

    def _ask_again(self, stamp: Stamp, microbatch: int) -> None:
        above = self.swarm.nodes[self.stage - 1]
        self.swarm.up[self.stage - 1].post(lambda: above.drive(ResendAsked(stamp.key, microbatch)))

    def _loses(self, command: Compute) -> bool:
        """Whether this command finds that it cannot read its activation, as it does at most once."""
        what = (command.stamp.key, command.microbatch)
        forward = command.op in (Op.FORWARD, Op.LOSS) and what not in self.lost
        if not forward or not self.swarm.world.loses(self.stage, command.stamp, command.microbatch):
            return False
        self.lost.add(what)
        return True

    def _computed(self, command: Compute) -> None:
        key, microbatch, last = command.stamp.key, command.microbatch, self.stage == self.swarm.world.stages - 1
        if self._loses(command):
            self.swarm.referee.loses(self.stage, command)
            return self.drive(Lost())
        match command.op:
            case Op.FORWARD | Op.SCORE | Op.RESEND if not last:
                self.swarm.referee.holds_back(self.stage, 1)
                below = self.swarm.nodes[self.stage + 1]
                self._down(lambda: below.came(ActivationCame(key, microbatch)), self._sent, size=1.0)
            case Op.LOSS | Op.BACKWARD if self.stage > 0:
                above = self.swarm.nodes[self.stage - 1]
                self.swarm.up[self.stage - 1].post(lambda: above.came(GradientCame(key, microbatch)), size=1.0)
            case Op.COMPARE:
                self.compared = command.stamp.tick
            case Op.APPLY:
                assert command.decide is not None
                self.position = self.position.after(command.stamp, command.decide)
                self.basis = max(self.basis, int(self.swarm.now / 40))
                if self.stage == 0 and command.decide.checkpoint:
                    self.swarm.saved = json.dumps(self.swarm.lead.state.to_json())
        return self.drive(Computed())

    def came(self, event: ActivationCame | GradientCame) -> None:
        self.arrived.add((event.key, event.microbatch, isinstance(event, GradientCame)))
        self.drive(event)

    def _sent(self) -> None:
        self.swarm.referee.holds_back(self.stage, -1)
        self.drive(Sent())

    def _vote(self, stamp: Stamp) -> None:
        gated, broken = self.swarm.world.verdict(stamp.batch, stamp.pass_, stamp.slice)
        last = self.stage == self.swarm.world.stages - 1
        culprit = self.stage == stamp.tick % self.swarm.world.stages
        votes, gate = self.below_voted
        broken = broken and culprit and stamp.microbatches > 0
        own, self.compared = (float("nan") if broken else 1.0, self.basis, self.compared), None
        votes, gate = [own, *votes], gate or last and gated and stamp.microbatches > 0
        self.below_voted = ([], False)
        if self.stage == 0:
            self.swarm.decide(stamp, votes, gate)
            return
        above = self.swarm.nodes[self.stage - 1]

        def deliver() -> None:
            above.below_voted = (votes, gate)
            above.drive(VoteCame(stamp.key))

        self.swarm.up[self.stage - 1].post(deliver)

    def begin(self, stamp: Stamp) -> None:
        assert stamp.lineage == self.next_lineage, f"stage {self.stage} does not share the history of {stamp}"
        self.swarm.referee.begins(self.stage, stamp)
        if self.stage + 1 < self.swarm.world.stages:
            self._down(lambda: self.swarm.nodes[self.stage + 1].begin(stamp))
        self.drive(Begun(stamp))

    def decided(self, stamp: Stamp, decide: Decide) -> None:
        self.next_lineage = self.position.after(stamp, decide).lineage
        if self.stage + 1 < self.swarm.world.stages:
            self._down(lambda: self.swarm.nodes[self.stage + 1].decided(stamp, decide))
        self.drive(Decided(decide, stamp.key))

    def _down(self, deliver: Callable[[], None], taken: Callable[[], None] | None = None, size: float = 0.0) -> None:
        self.swarm.down[self.stage].post(deliver, taken, size)


class Swarm:
    """All stages, the links between them, stage 0's lead and a sampler, on one virtual clock."""

    def __init__(self, w: World, clock: int, stop_at: float | None, before: Swarm | None) -> None:
        self.world, self.rng = w, random.Random(f"clock {w.seed} {clock}")
        state = LeadState() if before is None else LeadState.from_json(json.loads(before.saved))
        state.published = state.tick  # as the process does when it takes up a checkpoint
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self.lead = Lead(w.plan, state)
        position = Position(self.lead.state.tick, self.lead.state.lineage)
        self.nodes = [Node(self, stage, position) for stage in range(w.stages)]
        self.speed = [self.rng.choice((0.0, 1.0, 1.0, 8.0)) for _ in range(w.stages)]
        links = [(self.rng.choice((0.0, 1.0, 20.0)), self.rng.choice((0.0, 1.0, 30.0))) for _ in range(2 * w.stages)]
        self.down = [Link(self, *links[2 * i]) for i in range(w.stages - 1)]
        self.up = [Link(self, *links[2 * i + 1]) for i in range(w.stages - 1)]
        self.referee = Referee(w.stages)
        self.round_active = False
        self.stamps: list[Stamp] = []
        self.decisions: list[Decide] = []
        self.newest_batch = state.next_batch - 1  # the last one begun
        self.ahead = self.in_stock_is_old = False  # one is ordered, or waits
        self.held_basis, self.dropped = state.basis_version, 0
        self._dropped_before = state.dropped
        self.delivered: Counter[int] = Counter()
        self.saved = ""
        if stop_at is not None:
            self.at(stop_at, self._stop)

    def at(self, when: float, work: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._count), work))

    def later(self, scale: float, work: Callable[[], None]) -> None:
        self.at(self.now + scale * self.rng.random(), work)

    def run(self) -> Swarm:
        """To the end, with everything checked that must hold there."""
        self.advance()
        for _ in range(MOST_EVENTS):
            if not self._events:
                break
            self.now, _, work = heapq.heappop(self._events)
            work()
        assert not self._events, "the run does not end"
        waiting = [node.schedule.waiting_for() for node in self.nodes]
        assert all(node.schedule.idle for node in self.nodes), f"deadlock; stages wait for {waiting}"
        assert self.lead.finished and self.decisions[-1].stop and self.decisions[-1].checkpoint
        assert not any(decide.stop for decide in self.decisions[:-1])
        for node, applied in zip(self.nodes, self.referee.applied, strict=True):
            assert [decide for _, decide in applied] == self.decisions
            assert (node.position.tick, node.position.lineage) == (self.lead.state.tick, self.lead.state.lineage)
            assert not node.arrived, "a frame that nobody has used"
        assert self.referee.unsent == [0] * self.world.stages
        assert self.lead.state.dropped == self._dropped_before + self.dropped
        return self

    # What worker.py and leader.py do on stage 0 ------------------------------------------------------------------------

    def advance(self) -> None:
        self._order()
        if self.round_active or not self.nodes[0].schedule.idle or self.lead.finished:
            return
        hold = self.lead.hold()
        if hold is not None:
            self.referee.happened["hold"] += 1
            self._announce(Stamp(epoch=1, tick=self.lead.state.tick), hold)
            return
        dropped = self.lead.state.dropped
        stock = self.lead.next_batch(self.held_basis)
        if self.lead.state.dropped > dropped:
            assert stock is None and self.in_stock_is_old, "a batch was dropped that is not too old"
            self.dropped, self.ahead = self.dropped + 1, False
            self._order()
        if stock is not None:
            assert not self.in_stock_is_old, "a batch was begun that is too old"
            assert stock.batch == self.newest_batch + 1, "a batch was left out"
            self.newest_batch, self.ahead = stock.batch, False
            self._order()
        stamp = self.lead.next_round()
        if stamp is not None:
            assert stamp.basis_version <= self.held_basis
            self.round_active = True
            self.stamps.append(stamp)
            self.nodes[0].begin(stamp)

    def _order(self) -> None:
        order = self.lead.next_order()
        if order is None:
            return
        current = self.lead.state.current
        assert current is None or self.world.plan.overlap, "lockstep, and ordered before the batch has ended"
        assert not self.ahead, "more than one batch ahead"
        left = self.world.plan.ticks - self.lead.state.tick
        assert not self.world.plan.ticks or left > len(self.lead.state.plan), "ordered, and no tick is left for it"
        assert order.batch == self.newest_batch + 1, "not exactly the next batch"
        assert order.generate and order.weight_version <= self.lead.state.tick
        assert order.evaluate == (self.world.plan.eval_every > 0 and order.batch % self.world.plan.eval_every == 0)
        self.ahead = True
        self.later(60.0, lambda: self._deliver(order))

    def _deliver(self, order: Order) -> None:
        if order.batch >= self.world.batches:
            self.lead.sampler_exhausted()
        else:
            self.delivered[order.batch] += 1
            limit, tick = self.world.plan.staleness_limit, self.lead.state.tick
            old = self.world.too_old(order.batch) and self.delivered[order.batch] == 1 and tick > limit
            version = tick - limit - 1 if old else order.weight_version
            self.lead.accept(Stock(order.batch, version, self.world.microbatches(order.batch)))
            self.in_stock_is_old = old
        self.advance()

    def _stop(self) -> None:
        if not self.lead.finished:
            self.lead.stop_requested = True
            self.referee.happened[f"stop with round {self.round_active}"] += 1
            probing = self.round_active and self.stamps and self.stamps[-1].mode is Mode.PROBE
            self.referee.happened["probe stopped"] += bool(probing)
            self.advance()

    def decide(self, stamp: Stamp, votes: list[Ballot], gated: bool) -> None:
        assert len(votes) == self.world.stages
        self.held_basis = min(basis for _, basis, _ in votes)
        probed = stamp.tick if self.world.probed(stamp.tick, stamp.microbatches) else None
        assert [reported for *_, reported in votes] == [probed] * len(votes), "a probe is not reported with its tick"
        norms = [norm for norm, *_ in votes]
        self._announce(stamp, self.lead.decide(stamp, norms, 0.5, gated))

    def _announce(self, stamp: Stamp, decide: Decide) -> None:
        assert not self.decisions or not self.decisions[-1].stop, "a decision after the last"
        assert not self.lead.stop_requested or decide.stop, "a stop was asked for and this decision is not the last"
        self.decisions.append(decide)
        self.referee.happened[f"{Outcome(decide.outcome).name} {decide.reason}"] += 1
        self.round_active = True
        self.nodes[0].decided(stamp, decide)


@pytest.fixture
def simulate() -> Callable[..., Swarm]:
    """simulate(world, clock=0, stop_at=None, before=None) -> the swarm after its run; `before` is one to go on from."""

    def run(w: World, *, clock: int = 0, stop_at: float | None = None, before: Swarm | None = None) -> Swarm:
        return Swarm(w, clock, stop_at, before).run()

    return run


@pytest.fixture
def world() -> Callable[[int], World]:
    """world(seed) -> a random plan, number of stages, and what the sampler will deliver."""
    return make_world
