"""Which basis a round is stamped with: with pinning a batch has one, whatever arrives when; without it, always the newest."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_core.wire.messages import Mode
from swarm_worker.lead import Lead, LeadPlan, LeadState, Stock
from swarm_worker.schedule import Stamp

PLAN = LeadPlan(
    ticks=0,
    max_reuse=3,
    staleness_limit=100,
    overlap=True,
    eval_every=0,
    checkpoint_every=0,
    reference=True,
    probe_every=2,
)
# What is held by every stage when each round begins: never fewer than before, as stages only ever add versions.
ARRIVALS = st.lists(st.integers(0, 3), min_size=30, max_size=30)


def played(pinned: bool, arrivals: list[int], gated: set[int], restart_at: int = -1) -> list[tuple[int, Stamp]]:
    """(newest basis held, stamp) of rounds of all kinds, one for each arrival; with a resume before one of them."""
    plan = LeadPlan(**{**vars(PLAN), "pin_basis": pinned})
    lead, held, seen = Lead(plan), 0, []
    for at, more in enumerate(arrivals):
        held += more
        if at == restart_at:
            lead = Lead(plan, LeadState.from_json(json.loads(json.dumps(lead.state.to_json()))))
        if (order := lead.next_order()) is not None:
            sizes = ((2, 0, 1), (1, 1), (0, 0))[order.batch % 3]
            lead.accept(Stock(order.batch, order.weight_version, sizes))
        lead.next_batch(held)
        stamp = lead.next_round()
        assert stamp is not None
        seen.append((held, stamp))
        if stamp.mode is Mode.TRAIN:
            lead.decide(stamp, [1.0], 1.0, stamp.tick in gated)
    return seen


@settings(max_examples=60, deadline=None)
@given(ARRIVALS, st.sets(st.integers(0, 30)), st.integers(0, 29))
def test_a_pinned_batch_has_one_version_the_newest_when_it_began(
    arrivals: list[int], gated: set[int], restart_at: int
) -> None:
    versions, began = defaultdict(set), {}
    for held, stamp in played(True, arrivals, gated, restart_at):
        versions[stamp.batch].add(stamp.basis_version)
        began.setdefault(stamp.batch, held)
    assert {batch: {held} for batch, held in began.items()} == versions


@settings(max_examples=60, deadline=None)
@given(ARRIVALS, st.sets(st.integers(0, 30)), st.integers(0, 29))
def test_without_pinning_every_round_has_the_newest(arrivals: list[int], gated: set[int], restart_at: int) -> None:
    for held, stamp in played(False, arrivals, gated, restart_at):
        assert stamp.basis_version == held


@pytest.mark.parametrize("pinned", [True, False])
def test_score_probe_and_train_rounds_of_a_batch_with_a_refresh_in_the_middle(pinned: bool) -> None:
    seen = played(pinned, [4, 0, 0, 0, 1, 0], set())
    assert [stamp.mode for _, stamp in seen[:4]] == [Mode.REFERENCE, Mode.SCORE, Mode.PROBE, Mode.TRAIN]
    assert [stamp.basis_version for _, stamp in seen] == ([4] * 6 if pinned else [4, 4, 4, 4, 5, 5])
    assert {stamp.batch for _, stamp in seen} == {0}
    assert seen[-1][1].tick > 0, "a tick was decided before the refresh"


def test_a_version_that_not_everybody_holds_any_more_does_not_bring_back_an_older_one() -> None:
    lead = Lead(LeadPlan(**{**vars(PLAN), "pin_basis": False}), LeadState(basis_version=7))
    lead.next_batch(3)
    assert lead.state.basis_version == 7
