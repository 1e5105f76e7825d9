"""The lead by itself: plan, orders, staleness, decisions, stop and the state that a checkpoint keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import Decide, Mode, Outcome
from swarm_worker.lead import Lead, LeadPlan, LeadState, Stock, lineage_hash
from swarm_worker.schedule import Stamp

PLAN = LeadPlan(
    ticks=0, max_reuse=3, staleness_limit=6, overlap=True, eval_every=0, checkpoint_every=0, reference=False
)


def lead(**changes: Any) -> Lead:
    return Lead(replace(PLAN, **changes))


def supply(lead: Lead, *microbatches: int, basis: int = 0) -> None:
    """Order a batch, deliver it and start on it."""
    order = lead.next_order()
    assert order is not None
    lead.accept(Stock(order.batch, order.weight_version, microbatches))
    assert lead.next_batch(basis) is not None


def tick(lead: Lead, *, gated: bool = False, norm: float = 1.0) -> tuple[list[Stamp], Decide]:
    """Rounds up to and with the next tick, and its decision."""
    stamps = []
    while True:
        stamp = lead.next_round()
        assert stamp is not None
        stamps.append(stamp)
        if stamp.mode is Mode.TRAIN:
            return stamps, lead.decide(stamp, [1.0, norm], 0.25, gated)


def rounds(lead: Lead) -> list[tuple[str, int, int, int]]:
    """(mode, pass, slice, microbatches) until the batch ends."""
    found = []
    while lead.state.current is not None:
        stamps, _ = tick(lead)
        found += [(s.mode.name, s.pass_, s.slice, s.microbatches) for s in stamps]
    return found


@pytest.mark.parametrize(
    ("microbatches", "max_reuse", "wanted"),
    [
        ((2, 3), 1, ["S005", "T102", "T113"]),
        ((4,), 1, ["T104"]),  # one tick: the ratio is 1, nothing to score
        ((4,), 2, ["S004", "T104", "T204"]),
        ((2, 0), 3, ["S002", "T102", "T110", "T202", "T302"]),
        ((0, 2), 2, ["S002", "T100", "T112", "T212"]),
        ((0, 0), 3, ["T100", "T110"]),
        ((0,), 4, ["T100"]),
        ((0, 3), 1, ["S003", "T100", "T113"]),
    ],
)
def test_the_plan_of_a_batch(microbatches: tuple[int, ...], max_reuse: int, wanted: list[str]) -> None:
    subject = lead(max_reuse=max_reuse)
    supply(subject, *microbatches)
    assert [f"{mode[0]}{p}{i}{m}" for mode, p, i, m in rounds(subject)] == wanted
    assert subject.state.tick == sum(text[0] == "T" for text in wanted)
    assert subject.next_round() is None


def test_the_reference_pass_comes_before_the_score_pass_once() -> None:
    subject = lead(reference=True, max_reuse=2)
    supply(subject, 2, 1)
    assert [mode for mode, *_ in rounds(subject)] == ["REFERENCE", "SCORE", "TRAIN", "TRAIN", "TRAIN", "TRAIN"]
    supply(subject, 0, 0)
    assert [mode for mode, *_ in rounds(subject)] == ["TRAIN", "TRAIN"]
    single = lead(reference=True, max_reuse=1)
    supply(single, 2)
    assert [mode for mode, *_ in rounds(single)] == ["REFERENCE", "TRAIN"]


def test_the_gate_ends_the_reuse_of_a_batch_at_once() -> None:
    subject = lead()
    supply(subject, 1, 1)
    tick(subject)
    tick(subject)
    stamps, decide = tick(subject, gated=True)
    assert (stamps[-1].pass_, stamps[-1].slice) == (2, 0)
    assert (decide.outcome, decide.reason, decide.coefficient) == (Outcome.SKIP, "gate", 0.0)
    assert decide.end_of_batch and decide.publish and not decide.stop
    assert subject.state.current is None and subject.state.plan == []
    assert (subject.state.tick, subject.state.step, subject.state.published) == (3, 2, 3)


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_norm_that_is_no_number_skips_the_tick_and_ends_the_batch(norm: float) -> None:
    subject = lead()
    supply(subject, 1, 1)
    _, decide = tick(subject, norm=norm)
    assert (decide.outcome, decide.reason, decide.coefficient) == (Outcome.SKIP, "nonfinite", 0.0)
    assert decide.end_of_batch and subject.next_round() is None
    supply(subject, 1, 1)
    stamps, decide = tick(subject)
    assert (stamps[-1].batch, stamps[-1].tick, stamps[-1].step) == (1, 1, 0)
    assert (decide.outcome, decide.coefficient) == (Outcome.COMMIT, 0.25)


def test_an_empty_tick_after_a_score_pass_that_met_nan_ends_the_batch_too() -> None:
    subject = lead()
    supply(subject, 0, 1)
    _, decide = tick(subject, norm=float("inf"))
    assert decide.reason == "nonfinite" and decide.end_of_batch


def test_a_probe_comes_before_every_nth_tick_that_has_something_to_probe() -> None:
    subject = lead(probe_every=2, max_reuse=2)
    supply(subject, 3, 1, 0)  # ticks 0 to 4: slices 0, 1, 2 (empty), 0, 1
    found = [(mode, pass_, slice_, microbatches) for mode, pass_, slice_, microbatches in rounds(subject)]
    assert found[:3] == [("SCORE", 0, 0, 4), ("PROBE", 1, 0, 2), ("TRAIN", 1, 0, 3)]
    assert [row for row in found if row[0] == "PROBE"] == [("PROBE", 1, 0, 2), ("PROBE", 2, 1, 2)]


def test_a_tick_is_probed_once_and_again_only_by_a_resumed_lead() -> None:
    subject = lead(probe_every=1)
    supply(subject, 1)
    modes = [stamp.mode for stamp in (subject.next_round() for _ in range(4)) if stamp is not None]
    assert modes == [Mode.SCORE, Mode.PROBE, Mode.TRAIN, Mode.TRAIN]
    resumed = Lead(subject.plan, LeadState.from_json(json.loads(json.dumps(subject.state.to_json()))))
    stamp = resumed.next_round()
    assert stamp is not None and stamp.mode is Mode.PROBE


def test_a_probe_differs_from_its_tick_in_mode_and_microbatches_alone() -> None:
    subject = lead(probe_every=1, max_reuse=1)
    supply(subject, 3, basis=4)
    probe, train = tick(subject)[0]
    assert replace(probe, mode=Mode.TRAIN, microbatches=3) == train and probe.key != train.key


def test_every_decision_moves_the_lineage_and_only_a_commit_the_step() -> None:
    subject = lead(max_reuse=1)
    supply(subject, 1, 0, 1)
    lineage = 0
    for outcome, norm in ((Outcome.COMMIT, 1.0), (Outcome.SKIP, 1.0), (Outcome.SKIP, float("nan"))):
        stamps, decide = tick(subject, norm=norm)
        assert decide.outcome == outcome and stamps[-1].lineage == lineage
        lineage = lineage_hash(lineage, 1, 0, outcome)
        assert subject.state.lineage == lineage
    assert (subject.state.tick, subject.state.step) == (3, 1)


def test_lineages_tell_histories_apart() -> None:
    chains = {lineage_hash(p, e, a, o) for p in (0, 1) for e in (1, 2) for a in (0, 1) for o in Outcome}
    assert len(chains) == 2 * 2 * 2 * len(Outcome) and all(0 <= c < 2**64 for c in chains)


def test_with_overlap_the_next_batch_is_ordered_when_this_one_starts_and_no_further() -> None:
    subject = lead(eval_every=2)
    first = subject.next_order()
    assert first is not None and (first.batch, first.weight_version, first.evaluate) == (0, 0, True)
    assert subject.next_order() is None
    subject.accept(Stock(0, 0, (1,)))
    assert subject.next_order() is None  # one waits
    subject.next_batch(0)
    second = subject.next_order()
    assert second is not None and (second.batch, second.weight_version, second.evaluate) == (1, 0, False)
    subject.accept(Stock(1, 0, (1,)))
    assert subject.next_order() is None and subject.next_batch(0) is None  # batch 0 is under way
    rounds(subject)
    subject.next_batch(0)
    third = subject.next_order()
    assert third is not None and (third.batch, third.weight_version, third.evaluate) == (2, 3, True)


def test_in_lockstep_a_batch_is_ordered_when_the_last_one_has_ended() -> None:
    subject = lead(overlap=False, max_reuse=2)
    supply(subject, 1)
    tick(subject)
    assert subject.next_order() is None
    tick(subject)
    order = subject.next_order()
    assert order is not None and (order.batch, order.weight_version) == (1, 2)


def test_a_batch_too_old_is_dropped_counted_and_ordered_again() -> None:
    subject = lead(staleness_limit=2, overlap=False, max_reuse=3)
    supply(subject, 1)
    rounds(subject)
    for version, taken in ((0, False), (0, False), (1, True)):
        order = subject.next_order()
        assert order is not None and (order.batch, order.weight_version) == (1, 3)
        subject.accept(Stock(1, version, (1,)))
        assert (subject.next_batch(0) is not None) is taken
    assert subject.state.dropped == 2 and subject.age == 2


def test_what_counts_is_the_age_at_first_use_not_on_arrival() -> None:
    subject = lead(staleness_limit=2, max_reuse=3)
    supply(subject, 1)
    order = subject.next_order()
    assert order is not None
    subject.accept(Stock(1, 0, (1,)))  # young enough, but three ticks are still to come
    rounds(subject)
    assert subject.next_batch(0) is None and subject.state.dropped == 1
    again = subject.next_order()
    assert again is not None and (again.batch, again.weight_version) == (1, 3)


def test_no_batch_is_ordered_that_could_not_be_used() -> None:
    subject = lead(ticks=3, max_reuse=3)
    supply(subject, 1)
    assert subject.next_order() is None  # this batch reaches the last tick
    tick(subject)
    assert subject.next_order() is None
    tick(subject, gated=True)  # or it would have
    order = subject.next_order()
    assert order is not None and order.batch == 1


@pytest.mark.parametrize("batch", [1, 7])
def test_a_batch_that_nobody_ordered_is_refused_and_the_order_stands(batch: int) -> None:
    subject = lead()
    subject.next_order()
    with pytest.raises(BadFrame, match=f"batch {batch} arrived; ordered was 0"):
        subject.accept(Stock(batch, 0, (1,)))
    subject.accept(Stock(0, 0, (1,)))
    with pytest.raises(BadFrame, match="ordered was None"):
        subject.accept(Stock(0, 0, (1,)))


def test_a_batch_is_pinned_to_the_newest_basis_held_and_never_to_an_older_one() -> None:
    subject = lead(max_reuse=1)
    pinned = []
    for held in (0, 4, 2, 5):
        supply(subject, 1, basis=held)
        pinned.append(tick(subject)[0][-1].basis_version)
    assert pinned == [0, 4, 4, 5]


def test_a_stop_in_the_middle_of_a_batch_comes_with_the_next_decision() -> None:
    subject = lead()
    supply(subject, 1, 1)
    stamp = subject.next_round()
    assert stamp is not None and stamp.mode is Mode.SCORE
    stamp = subject.next_round()
    assert stamp is not None
    subject.stop_requested = True
    decide = subject.decide(stamp, [1.0], 1.0, False)
    assert (decide.stop, decide.checkpoint, decide.publish, decide.end_of_batch) == (True, True, True, False)
    assert subject.finished and subject.hold() is None
    assert subject.next_round() is None and subject.next_order() is None
    assert subject.state.current is not None and len(subject.state.plan) == 5


def test_a_stop_without_a_tick_under_way_is_a_hold_once() -> None:
    subject = lead()
    assert subject.hold() is None
    subject.stop_requested = True
    hold = subject.hold()
    assert hold == Decide(outcome=Outcome.HOLD, publish=True, checkpoint=True, stop=True)
    assert subject.hold() is None and subject.finished


def test_the_last_tick_stops_and_a_run_that_is_over_holds() -> None:
    subject = lead(ticks=2, checkpoint_every=1)
    supply(subject, 1)
    assert [tick(subject)[1].stop for _ in range(2)] == [False, True]
    again = Lead(replace(PLAN, ticks=2), subject.state)
    assert again.next_order() is None
    hold = again.hold()
    assert hold is not None and hold.stop


def test_checkpoints_come_every_so_many_ticks() -> None:
    subject = lead(checkpoint_every=2)
    supply(subject, 1, 1)
    assert [tick(subject)[1].checkpoint for _ in range(6)] == [False, True] * 3


def test_an_exhausted_sampler_ends_the_run_after_what_is_there() -> None:
    subject = lead(max_reuse=1)
    supply(subject, 1)
    assert subject.next_order() is not None
    subject.sampler_exhausted()
    assert subject.hold() is None  # a batch is under way
    assert not tick(subject)[1].stop
    assert subject.next_order() is None
    hold = subject.hold()
    assert hold is not None and hold.stop and hold.checkpoint


def test_what_waits_at_a_stop_is_drawn_again() -> None:
    subject = lead()
    supply(subject, 1)
    order = subject.next_order()
    assert order is not None
    subject.accept(Stock(order.batch, order.weight_version, (1,)))
    resumed = Lead(PLAN, LeadState.from_json(json.loads(json.dumps(subject.state.to_json()))))
    again = resumed.next_order()
    assert again is not None and again.batch == order.batch


@pytest.mark.parametrize("ticks_before", range(13))
def test_the_state_goes_through_json_in_the_middle_of_everything(ticks_before: int) -> None:
    def play(subject: Lead, until: int) -> list[object]:
        seen: list[object] = []
        while subject.state.tick < until:
            if subject.state.current is None:
                batch = subject.state.next_batch
                supply(subject, *((2, 0, 1), (1, 1), (0, 0), (3,))[batch % 4], basis=batch)
            at = subject.state.tick
            stamps, decide = tick(subject, gated=at == 8, norm=float("nan") if at == 3 else 1.0)
            seen += [*stamps, decide]
        return seen

    undisturbed = play(lead(reference=True), 13)
    first = lead(reference=True)
    seen = play(first, ticks_before)
    text = json.dumps(first.state.to_json())
    second = Lead(first.plan, LeadState.from_json(json.loads(text)))
    assert second.state == first.state
    assert seen + play(second, 13) == undisturbed


# Corrections -----------------------------------------------------------------------------------------------------------


def stamped(policy: Lead, own: dict[int, tuple[int, int]], everywhere: list[int]) -> int:
    policy.state.corrections = everywhere
    stamp = policy.next_round(own)
    assert stamp is not None and stamp.mode is Mode.TRAIN
    policy.decide(stamp, [1.0], 1.0, False)
    return stamp.correction


def test_the_newest_correction_that_all_hold_is_stamped_once_its_time_has_come() -> None:
    policy = lead(max_reuse=9, k_max=3)
    supply(policy, 1)
    policy.state.scored = True
    own = {1: (0, 1), 2: (1, 4), 3: (2, 2)}  # (snapshot tick, first tick)
    assert stamped(policy, own, [1]) == 0  # tick 0: it comes of this very tick
    assert stamped(policy, own, [1]) == 1
    assert stamped(policy, own, [1, 2]) == 1  # tick 2: version 2 is due in tick 4
    assert stamped(policy, own, [1, 2, 3, 9]) == 3  # version 9 is not here: it must not be stamped
    assert stamped(policy, own, [1, 2, 3]) == 3  # version 2 is due, and older
    assert stamped(policy, own, []) == 0
    assert stamped(policy, own, [1, 2, 3]) == 0  # tick 6: all are older than k_max
    assert policy.state.tick == 7


def test_only_ticks_with_signal_are_corrected() -> None:
    policy = lead(max_reuse=1, k_max=9)
    supply(policy, 0, 2)
    policy.state.corrections, policy.state.scored, policy.state.tick = [1], True, 5
    empty = policy.next_round({1: (0, 1)})
    assert empty is not None and (empty.mode, empty.microbatches, empty.correction) == (Mode.TRAIN, 0, 0)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.data())
def test_no_older_version_is_ever_stamped_after_a_newer_one(data: st.DataObject) -> None:
    policy = lead(max_reuse=40, k_max=data.draw(st.integers(1, 12)))
    supply(policy, 1)
    policy.state.scored = True
    latencies = data.draw(st.lists(st.integers(1, 9), min_size=12, max_size=12))
    own = {v: (2 * (v - 1), 2 * (v - 1) + k) for v, k in enumerate(latencies, start=1)}
    held: set[int] = set()
    newest = 0
    for t in range(30):
        held |= set(data.draw(st.lists(st.sampled_from(sorted(own)), max_size=2)))
        held = {v for v in held if own[v][0] < t and v >= newest}  # what a stage keeps
        version = stamped(policy, own, sorted(held))
        if version:
            assert version >= newest and own[version][1] <= t <= own[version][0] + policy.plan.k_max
            newest = version


def test_what_all_stages_hold_is_in_the_checkpoint() -> None:
    state = LeadState(corrections=[3, 4])
    assert LeadState.from_json(json.loads(json.dumps(state.to_json()))) == state
