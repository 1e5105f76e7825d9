"""Which words of the anchor a stage acts on, in whatever order and however often they come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarm_worker.turns import Turns


def working_in(epoch: int) -> Turns:
    turns = Turns()
    assert turns.start(epoch, recovery=False)
    return turns


def test_a_fence_that_is_said_again_is_answered_again_until_the_epoch_begins() -> None:
    turns = working_in(1)
    assert turns.fence(2) and turns.fence(2)
    assert turns.start(2, recovery=True)
    assert not turns.fence(2) and turns.fence(3)


def test_an_epoch_is_begun_once_and_by_those_alone_who_have_answered_for_it() -> None:
    turns = working_in(1)
    assert not turns.start(1, recovery=False) and not turns.start(2, recovery=True)
    assert turns.fence(2) and turns.start(2, recovery=True) and not turns.start(2, recovery=True)
    assert turns.fence(4) and not turns.start(2, recovery=True) and not turns.start(3, recovery=True)


def test_a_newcomer_answers_before_it_begins() -> None:
    turns = Turns()
    assert not turns.start(7, recovery=True)
    assert turns.fence(7) and turns.start(7, recovery=True)


@given(st.lists(st.tuples(st.sampled_from(["fence", "start"]), st.integers(1, 6))))
def test_epochs_only_ever_grow(words: list[tuple[str, int]]) -> None:
    turns, answered, begun = Turns(), [0], [0]
    for word, epoch in words:
        if word == "fence" and turns.fence(epoch):
            assert epoch >= answered[-1] and epoch > begun[-1]
            answered.append(epoch)
        elif word == "start" and turns.start(epoch, recovery=True):
            assert epoch == answered[-1] and epoch > begun[-1]
            begun.append(epoch)
