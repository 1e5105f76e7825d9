"""Schedule and lead in hundreds of random runs (conftest.py has the simulation): what a run must consist of, that a stop
and a resume change nothing, and that bugs like ours do not get through.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from swarm_core.wire.messages import Decide, Mode, Order, Outcome
from swarm_worker.lead import Lead
from swarm_worker.schedule import Compute, Op, ProtocolError, Schedule, Stamp

SCENARIOS = 480
Row = tuple[Any, ...]
World = Any
Swarm = Any
Simulate = Callable[..., Swarm]
Worlds = Callable[[int], World]
Caught = Callable[[], str]
Patch = Callable[..., Any]
Monkey = pytest.MonkeyPatch


def expected_rounds(w: World) -> Iterator[Row]:
    """(mode, batch, pass, slice, microbatches) of every round of an undisturbed run, and (outcome, reason) of ticks."""
    tick = 0
    for batch in range(w.batches):
        sizes = w.microbatches(batch)
        ticks = [(1, i) for i in range(len(sizes))]
        for pass_ in range(2, w.plan.max_reuse + 1):
            ticks += [(pass_, i) for i, size in enumerate(sizes) if size]
        if w.plan.ticks and tick == w.plan.ticks:
            return
        if w.plan.reference and any(sizes):
            yield Mode.REFERENCE, batch, 0, 0, sum(sizes), "", ""
        if len(ticks) > 1 and any(sizes):
            yield Mode.SCORE, batch, 0, 0, sum(sizes), "", ""
        for pass_, i in ticks:
            if w.plan.ticks and tick == w.plan.ticks:
                return
            gated, broken = w.verdict(batch, pass_, i)
            reason = "no_signal" if not sizes[i] else "nonfinite" if broken else "gate" if gated else ""
            if w.probed(tick, sizes[i]):
                yield Mode.PROBE, batch, pass_, i, 2, "", ""
            yield Mode.TRAIN, batch, pass_, i, sizes[i], "SKIP" if reason else "COMMIT", reason
            tick += 1
            if sizes[i] and (gated or broken):
                break


def rows(stamps: list[Stamp], decisions: list[Decide]) -> list[Row]:
    """The run as `expected_rounds` puts it."""
    decided = iter(decisions)
    found: list[Row] = []
    for s in stamps:
        decide = next(decided) if s.mode is Mode.TRAIN else None
        end = (Outcome(decide.outcome).name, decide.reason) if decide is not None else ("", "")
        found.append((s.mode, s.batch, s.pass_, s.slice, s.microbatches, *end))
    return found


@pytest.mark.parametrize("part", range(8))
def test_every_random_run_keeps_every_invariant(part: int, world: Worlds, simulate: Simulate) -> None:
    for seed in range(part, SCENARIOS, 8):
        w = world(seed)
        swarm = simulate(w)
        assert rows(swarm.stamps, swarm.decisions) == list(expected_rounds(w)), f"seed {seed}"
        check_stamps(swarm)


def check_stamps(swarm: Swarm) -> None:
    """Ticks count up by one, steps by commits; a batch keeps its basis; checkpoints come on time."""
    tick = step = 0
    basis: dict[int, int] = {}
    decided = iter(swarm.decisions)
    for stamp in swarm.stamps:
        assert (stamp.tick, stamp.step) == (tick, step)
        assert basis.setdefault(stamp.batch, stamp.basis_version) == stamp.basis_version
        if stamp.mode is Mode.TRAIN:
            decide = next(decided)
            tick, step = tick + 1, step + (decide.outcome == Outcome.COMMIT)
            every = swarm.world.plan.checkpoint_every
            assert decide.checkpoint == (decide.stop or every > 0 and tick % every == 0)
            assert decide.publish == (decide.end_of_batch or decide.stop)
            assert decide.coefficient == (0.5 if decide.outcome == Outcome.COMMIT else 0.0)
    assert list(basis.values()) == sorted(basis.values())


def test_the_scenarios_are_not_too_easy(world: Worlds, simulate: Simulate) -> None:
    happened: Counter[str] = Counter()
    for seed in range(SCENARIOS):
        swarm = simulate(world(seed), stop_at=40.0 * (seed % 7) if seed % 3 == 0 else None)
        happened.update(swarm.referee.happened)
        happened["dropped"] += swarm.dropped
    wanted = ("COMMIT ", "SKIP gate", "SKIP nonfinite", "SKIP no_signal", "HOLD ", "begun early", "credit used up")
    wanted += ("in flight at the bound", "stop with round True", "stop with round False", "dropped")
    wanted += ("probed", "probe stopped", "resent", "resent after the last forward")
    assert {name: happened[name] for name in wanted if happened[name] < 5} == {}


@pytest.mark.parametrize("part", range(4))
def test_stopped_anywhere_and_resumed_from_json_it_goes_on_as_if_undisturbed(
    part: int, world: Worlds, simulate: Simulate
) -> None:
    in_the_middle = probed_again = 0
    for seed in range(part, 240, 4):
        w = world(seed)
        whole = simulate(w)
        first = simulate(w, stop_at=whole.now * random.Random(seed).random())
        second = simulate(w, clock=1, before=first)
        # Which basis a batch is pinned to depends on when the anchor's answer came, so on the clock.
        stamps = [[replace(s, basis_version=0) for s in run.stamps] for run in (whole, first, second)]
        if stamps[1] and stamps[1][-1].mode is Mode.PROBE:  # its tick was not decided, so it is probed again
            assert stamps[2][:1] == stamps[1][-1:]
            stamps[1].pop()
            probed_again += 1
        assert stamps[1] + stamps[2] == stamps[0], f"seed {seed}"
        ticks = [[d for d in run.decisions if d.outcome != Outcome.HOLD] for run in (whole, first, second)]
        assert rows(stamps[0], ticks[1] + ticks[2]) == rows(stamps[0], ticks[0])
        assert second.lead.state.lineage == whole.lead.state.lineage
        in_the_middle += bool(ticks[1]) and not ticks[1][-1].end_of_batch
    assert in_the_middle >= 4 and probed_again >= 1


@pytest.mark.parametrize("losing", [0.0, 1.0])
def test_activations_lost_and_sent_again_change_nothing_that_was_decided(
    losing: float, world: Worlds, simulate: Simulate
) -> None:
    for seed in range(60):
        w = world(seed)
        undisturbed, swarm = simulate(w), simulate(replace(w, losing=losing))
        assert [replace(s, basis_version=0) for s in swarm.stamps] == [
            replace(s, basis_version=0) for s in undisturbed.stamps
        ]
        assert swarm.decisions == undisturbed.decisions
        trained = sum(s.microbatches for s in swarm.stamps if s.mode is Mode.TRAIN)
        assert swarm.referee.happened["resent"] == losing * trained * (w.stages - 1)


# A simulation that catches nothing proves nothing: bugs that look like ours ------------------------------------------


@pytest.fixture
def caught(world: Worlds, simulate: Simulate) -> Callable[[], str]:
    """caught() -> the objection to the first run that goes wrong, or an empty string."""

    def search() -> str:
        for seed in range(SCENARIOS):
            w = world(seed)
            try:
                swarm = simulate(w)
                assert rows(swarm.stamps, swarm.decisions) == list(expected_rounds(w)), "another plan"
                check_stamps(swarm)
            except (AssertionError, ProtocolError) as error:
                return str(error) or "objection"
        return ""

    return search


def newest_gradient_first(schedule: Schedule, r: Any, original: Callable[..., Any]) -> Compute | None:
    command = original(schedule, r)
    if command is not None and command.op is Op.BACKWARD:
        return replace(command, microbatch=max(r.gradients))
    return command


def tally_without_gradients(schedule: Schedule, r: Any, original: Callable[..., Any]) -> Compute | None:
    if r.stamp.mode is Mode.TRAIN and not r.tallied and 0 < r.stamp.microbatches == r.forwarded:
        return Compute(Op.TALLY, r.stamp)
    return original(schedule, r)


def apply_before_the_vote(schedule: Schedule, r: Any, original: Callable[..., Any]) -> Compute | None:
    if r.tallied and r.decide is None:
        return Compute(Op.APPLY, r.stamp, decide=Decide(outcome=Outcome.COMMIT, coefficient=0.5))
    return original(schedule, r)


def all_forwards_first(schedule: Schedule, r: Any, original: Callable[..., Any]) -> Compute | None:
    ready = r.forwarded < r.stamp.microbatches and r.forwarded in r.activations
    if r.stamp.mode is Mode.TRAIN and ready and not schedule.last and schedule._unsent < schedule.credit:
        return Compute(Op.FORWARD, r.stamp, r.forwarded)
    return original(schedule, r)


def no_credit(schedule: Schedule, r: Any, original: Callable[..., Any]) -> Compute | None:
    held, schedule._unsent = schedule._unsent, 0
    try:
        return original(schedule, r)
    finally:
        schedule._unsent = held


def compare_after_one(schedule: Schedule, r: Any, original: Callable[..., Any]) -> Compute | None:
    if r.stamp.mode is Mode.PROBE and r.backwarded == 1:
        return Compute(Op.COMPARE, r.stamp)
    return original(schedule, r)


def vote_on_a_probe(schedule: Schedule, r: Any, original: Callable[..., Any]) -> Compute | None:
    command = original(schedule, r)
    if command is not None and command.op is Op.COMPARE:
        return replace(command, op=Op.TALLY)
    return command


def deaf_to_requests(schedule: Schedule, r: Any, original: Callable[..., Any]) -> Compute | None:
    r.to_resend.clear()
    return original(schedule, r)


def resend_what_comes_next(schedule: Schedule, r: Any, original: Callable[..., Any]) -> Compute | None:
    command = original(schedule, r)
    if command is not None and command.op is Op.RESEND:
        return replace(command, microbatch=r.forwarded - 1)
    return command


@pytest.mark.parametrize(
    ("bug", "objection"),
    [
        (compare_after_one, "compared before both are there"),
        (vote_on_a_probe, "what is no tick"),
        (deaf_to_requests, "deadlock"),
        (resend_what_comes_next, "sent again what nobody lost"),
        (newest_gradient_first, "backward out of order"),
        (tally_without_gradients, "tallied before all gradients"),
        (apply_before_the_vote, "applies before stage"),
        (all_forwards_first, "microbatches in flight"),
        (no_credit, "activations unsent"),
    ],
)
def test_a_bug_in_the_schedule_is_caught(bug: Patch, objection: str, monkeypatch: Monkey, caught: Caught) -> None:
    original = Schedule._next
    monkeypatch.setattr(Schedule, "_next", lambda self, r: bug(self, r, original))
    assert objection in caught()


def test_an_activation_that_counts_as_arrived_although_it_was_lost_is_caught(
    monkeypatch: Monkey, caught: Caught
) -> None:
    original = Schedule._lost

    def lost(self: Schedule) -> Any:
        arrived = set(self._rounds[0].activations)
        command = original(self)
        self._rounds[0].activations |= arrived
        return command

    monkeypatch.setattr(Schedule, "_lost", lost)
    assert "which is not there" in caught()


def score_as_train(lead: Lead, original: Callable[[Lead], Stamp | None]) -> Stamp | None:
    stamp = original(lead)
    return replace(stamp, mode=Mode.TRAIN) if stamp is not None and stamp.mode is Mode.SCORE else stamp


def never_scored(lead: Lead, original: Callable[[Lead], Stamp | None]) -> Stamp | None:
    lead.state.scored = True
    return original(lead)


def probe_every_tick(lead: Lead, original: Callable[[Lead], Stamp | None]) -> Stamp | None:
    lead.plan = replace(lead.plan, probe_every=min(lead.plan.probe_every, 1))
    return original(lead)


def probe_again_and_again(lead: Lead, original: Callable[[Lead], Stamp | None]) -> Stamp | None:
    lead._probed -= lead.state.tick % 2
    return original(lead)


@pytest.mark.parametrize("bug", [score_as_train, never_scored, probe_every_tick, probe_again_and_again])
def test_a_bug_in_the_rounds_is_caught(bug: Patch, monkeypatch: Monkey, caught: Caught) -> None:
    original = Lead.next_round
    monkeypatch.setattr(Lead, "next_round", lambda self, corrections=None: bug(self, original))
    assert caught()


def skip_keeps_the_lineage(lead: Lead, gated: bool, decide: Decide, before: dict[str, Any]) -> None:
    if decide.outcome == Outcome.SKIP:
        lead.state.lineage = before["lineage"]


def skip_is_no_tick(lead: Lead, gated: bool, decide: Decide, before: dict[str, Any]) -> None:
    if decide.outcome == Outcome.SKIP:
        lead.state.tick = before["tick"]


def gate_goes_on_with_the_batch(lead: Lead, gated: bool, decide: Decide, before: dict[str, Any]) -> None:
    if gated and len(before["plan"]) > 1:
        lead.state.plan = before["plan"][1:]
        lead.state.current, decide.end_of_batch = before["stock"], False


def stop_without_a_checkpoint(lead: Lead, gated: bool, decide: Decide, before: dict[str, Any]) -> None:
    decide.checkpoint = False


BUGS = [skip_keeps_the_lineage, skip_is_no_tick, gate_goes_on_with_the_batch, stop_without_a_checkpoint]


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_the_decisions_is_caught(bug: Patch, monkeypatch: Monkey, caught: Caught) -> None:
    original = Lead.decide

    def decide(self: Lead, stamp: Stamp, norms: list[float], coefficient: float, gated: bool) -> Decide:
        before = self.state.to_json() | {"stock": self.state.current, "plan": list(self.state.plan)}
        result = original(self, stamp, norms, coefficient, gated)
        bug(self, gated, result, before)
        return result

    monkeypatch.setattr(Lead, "decide", decide)
    assert caught()


def test_ordering_two_batches_ahead_is_caught(monkeypatch: Monkey, caught: Caught) -> None:
    original = Lead.next_order

    def next_order(self: Lead) -> Order | None:
        stock, self._in_stock = self._in_stock, None
        order = original(self)
        self._in_stock = stock
        return order

    monkeypatch.setattr(Lead, "next_order", next_order)
    assert "more than one batch ahead" in caught()
