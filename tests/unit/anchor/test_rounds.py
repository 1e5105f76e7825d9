"""Epochs at the anchor: where the next one begins, and who is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchor_node.rounds import Phase, Rounds
from swarm_core.wire.errors import BadFrame, NothingHeld, StaleEpoch
from swarm_core.wire.messages import Decide, Held, Outcome

START = 77


def fenced(stages: int = 3) -> Rounds:
    rounds = Rounds(stages, 1, START)
    rounds.work()
    assert rounds.fence() == 2 and rounds.phase is Phase.FENCED
    return rounds


def held(first: int, last: int, *, pending: bool = False, start: int = START, epoch: int = 2, fork: int = 0) -> Held:
    """Ticks first..last; lineages of histories with another `fork` differ."""
    ticks = list(range(first, last + 1))
    behind = [1000 * fork + last + 1, 500_000 + last] if pending else []
    return Held(epoch, start, ticks, [1000 * fork + tick for tick in ticks], behind)


def test_the_next_epoch_begins_at_the_newest_version_of_all() -> None:
    rounds = fenced()
    assert rounds.take(2, held(0, 7)) is None and rounds.missing() == [0, 1]
    assert rounds.take(0, held(4, 9)) is None
    line = rounds.take(1, held(2, 8))
    assert line is not None and line.epoch == 2 and line.version == (7, 7)
    assert rounds.phase is Phase.WORKING


def test_who_has_voted_reaches_what_stage_0_has_decided_and_is_told_the_decision() -> None:
    rounds = fenced()
    decide = Decide(Outcome.COMMIT, 0.5)
    lead = held(0, 9)
    lead.decided = decide
    rounds.take(0, lead)
    rounds.take(1, held(0, 8, pending=True))
    line = rounds.take(2, held(0, 9))
    assert line is not None and line.version == (9, 9) and line.decide == decide


def test_what_is_voted_on_and_not_decided_is_no_version() -> None:
    rounds = fenced(2)
    rounds.take(1, held(0, 8, pending=True))
    line = rounds.take(0, held(0, 8))
    assert line is not None and line.version == (8, 8)


@pytest.mark.parametrize("nothing", [held(0, 5, start=1), Held(2, START), held(0, 5, fork=3), held(30, 40)])
def test_a_stage_with_nothing_in_common_is_refused_and_another_may_come(nothing: Held) -> None:
    rounds = fenced(2)
    rounds.take(0, held(10, 20))
    with pytest.raises(NothingHeld, match="stage 1 holds (nothing of this run|ticks .* of another history)") as caught:
        rounds.take(1, nothing)
    assert "\n" not in str(caught.value) and rounds.missing() == [1]
    assert rounds.take(1, held(15, 25)) is not None


def test_a_newcomer_with_nothing_is_refused_also_when_it_speaks_first() -> None:
    rounds = fenced(2)
    with pytest.raises(NothingHeld, match="stage 1 holds nothing of this run"):
        rounds.take(1, Held(2, START))
    assert rounds.take(0, held(10, 20)) is None


def test_answers_to_an_earlier_fence_and_to_none_are_stale() -> None:
    rounds = fenced(2)
    rounds.take(0, held(0, 5))
    assert rounds.fence() == 3 and rounds.missing() == [0, 1], "what was said for epoch 2 counts no more"
    with pytest.raises(StaleEpoch, match="for epoch 2; this is epoch 3"):
        rounds.take(1, held(0, 5))
    rounds.work()
    with pytest.raises(StaleEpoch):
        rounds.take(1, held(0, 5, epoch=3))


@pytest.mark.parametrize(
    "wrong", [Held(2, START, [1, 2], [5]), Held(2, START, [2, 1], [5, 6]), Held(2, START, [1, 1], [5, 6])]
)
def test_what_makes_no_sense_is_refused(wrong: Held) -> None:
    with pytest.raises(BadFrame, match="not in order"):
        fenced().take(0, wrong)


def test_who_is_gone_says_anew_what_it_holds() -> None:
    rounds = fenced(2)
    rounds.take(0, held(0, 5))
    rounds.gone(0)
    assert rounds.missing() == [0, 1]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20), st.booleans()), min_size=1, max_size=5))
def test_no_version_is_newer_than_what_all_can_reach_and_none_that_all_hold_is_left_out(
    spans: list[tuple[int, int, bool]],
) -> None:
    """What a vote leads to can be reached where stage 0 tells the decision, and it tells its newest alone."""
    rounds, line, told = fenced(len(spans)), None, spans[0][0] + spans[0][1]
    reach: list[set[int]] = []  # of each stage, if any decision were told
    strictly: list[set[int]] = []
    for stage, (first, more, voted) in enumerate(spans):
        voted = voted and stage > 0  # stage 0 decides
        applied = set(range(first, first + more + 1))
        reach.append(applied | ({first + more + 1} if voted else set()))
        strictly.append(applied | reach[-1] & {told})
        said = held(first, first + more, pending=voted)
        said.decided = Decide(Outcome.SKIP)
        wanted = set.intersection(*(strictly if stage == len(spans) - 1 else reach))
        if not wanted:
            with pytest.raises(NothingHeld):
                rounds.take(stage, said)
            return
        line = rounds.take(stage, said)
    assert line is not None and line.version[0] == max(wanted)
    assert line.decide.outcome == (Outcome.SKIP if line.version[0] == told else Outcome.HOLD)


def test_who_has_voted_on_an_older_tick_goes_back_to_before_it() -> None:
    """Its copy is behind: nobody tells it any more how that tick was decided."""
    rounds = fenced(2)
    rounds.take(0, held(0, 9))
    line = rounds.take(1, held(0, 4, pending=True))
    assert line is not None and line.version == (4, 4) and line.decide == Decide()
