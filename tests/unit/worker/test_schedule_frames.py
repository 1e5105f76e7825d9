"""One stage's schedule by hand: the order of 1F1B, what it waits for, and every frame that the protocol does not allow."""

from __future__ import annotations

import pytest

from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import Decide, Mode, Outcome
from swarm_worker.schedule import (
    ActivationCame,
    AskAgain,
    Begun,
    CastVote,
    Command,
    Compute,
    Computed,
    Decided,
    Event,
    Finished,
    GradientCame,
    Lost,
    Op,
    ProtocolError,
    ResendAsked,
    Schedule,
    Sent,
    Stamp,
    VoteCame,
)

TICK = Stamp(epoch=1, tick=4, batch=2, pass_=1, microbatches=3)
SCORE = Stamp(epoch=1, tick=4, batch=2, mode=Mode.SCORE, microbatches=3)
PROBE = Stamp(epoch=1, tick=4, batch=2, pass_=1, mode=Mode.PROBE, microbatches=2)
COMMIT = Decided(Decide(outcome=Outcome.COMMIT, coefficient=1.0))


def fed(schedule: Schedule, *events: Event) -> list[Command]:
    return [command for event in events for command in schedule.handle(event)]


def ops(commands: list[Command]) -> list[tuple[Op, int]]:
    return [(c.op, c.microbatch) for c in commands if isinstance(c, Compute)]


def test_the_middle_stage_of_three() -> None:
    schedule = Schedule(1, 3)
    key = TICK.key
    assert ops(fed(schedule, Begun(TICK))) == []
    assert schedule.waiting_for() == "tick 4 train: activation 0 of stage 0"
    assert ops(fed(schedule, *(ActivationCame(key, i) for i in range(3)))) == [(Op.FORWARD, 0)]
    assert schedule.waiting_for() == ""
    assert ops(fed(schedule, Computed())) == [(Op.FORWARD, 1)]
    assert ops(fed(schedule, Computed())) == []  # two in flight: as many as stages from here on
    assert schedule.waiting_for() == "tick 4 train: gradient 0 of stage 2"
    assert ops(fed(schedule, GradientCame(key, 0), Computed())) == [(Op.BACKWARD, 0), (Op.FORWARD, 2)]
    assert ops(fed(schedule, GradientCame(key, 1), Computed(), Computed())) == [(Op.BACKWARD, 1)]
    assert ops(fed(schedule, GradientCame(key, 2), Computed())) == [(Op.BACKWARD, 2), (Op.TALLY, 0)]
    assert fed(schedule, Computed()) == []
    assert schedule.waiting_for() == "tick 4 train: the vote of stage 2"
    assert fed(schedule, VoteCame(key)) == [CastVote(TICK)]
    assert schedule.waiting_for() == "tick 4 train: the decision of stage 0"
    assert ops(fed(schedule, COMMIT)) == [(Op.APPLY, 0)]
    assert fed(schedule, Computed()) == [Finished(TICK)]
    assert schedule.idle and schedule.waiting_for() == ""


def test_a_single_stage_needs_nobody() -> None:
    schedule = Schedule(0, 1)
    commands = fed(schedule, Begun(TICK), *[Computed()] * 4)
    assert ops(commands) == [(Op.LOSS, 0), (Op.LOSS, 1), (Op.LOSS, 2), (Op.TALLY, 0)]
    assert commands[-1] == CastVote(TICK)


def test_an_empty_tick_is_tallied_and_decided() -> None:
    schedule = Schedule(0, 2)
    empty = Stamp(epoch=1, tick=0, microbatches=0)
    assert ops(fed(schedule, Begun(empty))) == [(Op.TALLY, 0)]
    assert fed(schedule, VoteCame(empty.key), Computed()) == [CastVote(empty)]


def test_a_score_round_stops_at_the_credit_and_has_no_vote() -> None:
    schedule = Schedule(0, 2)
    many = Stamp(epoch=1, mode=Mode.SCORE, microbatches=7)
    assert ops(fed(schedule, Begun(many), *[Computed()] * 4)) == [(Op.SCORE, i) for i in range(4)]
    assert schedule.waiting_for() == "tick 0 score: the link to stage 1, to take an activation"
    commands = fed(schedule, *[Sent(), Computed()] * 3)
    assert ops(commands) == [(Op.SCORE, i) for i in (4, 5, 6)]
    assert commands[-1] == Finished(many)


def test_frames_of_a_later_round_may_come_early() -> None:
    schedule = Schedule(1, 2)
    one = Stamp(epoch=1, mode=Mode.SCORE, microbatches=1)
    commands = fed(schedule, Begun(one), Begun(TICK), ActivationCame(TICK.key, 0), ActivationCame(one.key, 0))
    assert ops(commands) == [(Op.SCORE, 0)]
    assert fed(schedule, Computed()) == [Finished(one), Compute(Op.LOSS, TICK, 0)]


def test_a_hold_waits_for_what_was_begun_before() -> None:
    schedule = Schedule(1, 2)
    one = Stamp(epoch=1, mode=Mode.SCORE, microbatches=1)
    hold = Decided(Decide(outcome=Outcome.HOLD, checkpoint=True, stop=True))
    assert ops(fed(schedule, Begun(one), hold)) == []
    assert ops(fed(schedule, ActivationCame(one.key, 0), Computed())) == [(Op.SCORE, 0), (Op.APPLY, 0)]
    fed(schedule, Computed())
    assert schedule.idle


def test_a_probe_ends_with_its_comparison_and_has_no_vote() -> None:
    schedule = Schedule(1, 3)
    fed(schedule, Begun(PROBE), Begun(TICK))
    commands = fed(schedule, ActivationCame(PROBE.key, 0), ActivationCame(PROBE.key, 1), Computed(), Computed())
    assert ops(commands) == [(Op.FORWARD, 0), (Op.FORWARD, 1)]
    assert schedule.waiting_for() == "tick 4 probe: gradient 0 of stage 2"
    commands = fed(schedule, GradientCame(PROBE.key, 0), GradientCame(PROBE.key, 1), Computed(), Computed())
    assert ops(commands) == [(Op.BACKWARD, 0), (Op.BACKWARD, 1), (Op.COMPARE, 0)]
    assert ops(fed(schedule, ActivationCame(TICK.key, 0))) == []  # the tick's come early, and wait
    assert fed(schedule, Computed()) == [Finished(PROBE), Compute(Op.FORWARD, TICK, 0)]


def test_the_last_stage_of_a_probe() -> None:
    schedule = Schedule(1, 2)
    came = [ActivationCame(PROBE.key, i) for i in range(2)]
    assert ops(fed(schedule, Begun(PROBE), *came, Computed(), Computed())) == [
        (Op.LOSS, 0),
        (Op.LOSS, 1),
        (Op.COMPARE, 0),
    ]
    assert fed(schedule, Computed()) == [Finished(PROBE)]


def test_a_lost_activation_counts_as_not_arrived_until_it_comes_whole() -> None:
    schedule = Schedule(1, 2)
    fed(schedule, Begun(TICK), ActivationCame(TICK.key, 0), ActivationCame(TICK.key, 1))
    assert fed(schedule, Lost()) == [AskAgain(TICK, 0)]
    assert schedule.waiting_for() == "tick 4 train: activation 0 of stage 0"  # and microbatch 1 waits for its turn
    assert ops(fed(schedule, ActivationCame(TICK.key, 0), Computed())) == [(Op.LOSS, 0), (Op.LOSS, 1)]


def test_a_stage_goes_on_with_backwards_while_it_waits_for_what_it_has_lost() -> None:
    schedule = Schedule(1, 3)
    fed(schedule, Begun(TICK), ActivationCame(TICK.key, 0), Computed(), ActivationCame(TICK.key, 1))
    assert ops(fed(schedule, GradientCame(TICK.key, 0), Lost())) == [(Op.BACKWARD, 0)]


def test_what_was_lost_is_sent_again_before_anything_else() -> None:
    schedule = Schedule(0, 2)
    assert ops(fed(schedule, Begun(TICK), Computed())) == [(Op.FORWARD, 0), (Op.FORWARD, 1)]
    assert ops(fed(schedule, ResendAsked(TICK.key, 0), Computed())) == [(Op.RESEND, 0)]
    assert ops(fed(schedule, GradientCame(TICK.key, 0), Computed())) == [(Op.BACKWARD, 0)]
    assert schedule._unsent == 3  # the link has to take it, too


def test_a_request_comes_when_nothing_is_left_to_forward() -> None:
    schedule = Schedule(0, 2)
    one = Stamp(epoch=1, microbatches=1)
    assert ops(fed(schedule, Begun(one), Computed())) == [(Op.FORWARD, 0)]
    assert ops(fed(schedule, ResendAsked(one.key, 0))) == [(Op.RESEND, 0)]
    commands = fed(schedule, Computed(), GradientCame(one.key, 0), Computed())
    assert ops(commands) == [(Op.BACKWARD, 0), (Op.TALLY, 0)]


STARTED: list[Event] = [Begun(TICK), *(ActivationCame(TICK.key, i) for i in range(3)), Computed(), Computed()]
VOTED: list[Event] = [GradientCame(TICK.key, 0), Computed(), GradientCame(TICK.key, 1), Computed(), Computed()]
VOTED += [GradientCame(TICK.key, 2), Computed(), Computed(), VoteCame(TICK.key)]
LOST: list[Event] = [Begun(TICK), ActivationCame(TICK.key, 0), Lost()]
OTHER = (1, 5, 0, Mode.TRAIN, 2)


@pytest.mark.parametrize(
    ("before", "event", "message"),
    [
        ([], ActivationCame(TICK.key, 0), "a frame of round .* arrived; open are"),
        ([], GradientCame(TICK.key, 0), "a frame of round"),
        ([], VoteCame(TICK.key), "a frame of round"),
        ([], COMMIT, "COMMIT came, but no tick of stage 1 has voted"),
        ([], Computed(), "never started"),
        ([Begun(TICK)], Begun(TICK), "begun twice"),
        ([], Begun(Stamp(mode=Mode.SCORE, microbatches=0)), "without a microbatch"),
        ([Begun(TICK)], ActivationCame(OTHER, 0), "a frame of round"),
        ([Begun(TICK)], ActivationCame((2, *TICK.key[1:]), 0), "a frame of round"),
        ([Begun(TICK)], ActivationCame(SCORE.key, 0), "a frame of round"),
        ([Begun(TICK), ActivationCame(TICK.key, 1)], ActivationCame(TICK.key, 1), "activation 1 .* came twice"),
        ([Begun(TICK)], ActivationCame(TICK.key, 3), "only those below 3"),
        ([Begun(TICK)], ActivationCame(TICK.key, 2**32 - 1), "only those below 3"),
        ([*STARTED, GradientCame(TICK.key, 0)], GradientCame(TICK.key, 0), "gradient 0 .* came twice"),
        (STARTED, GradientCame(TICK.key, 2), "gradient 2 .* only those below 2"),
        ([Begun(SCORE), ActivationCame(SCORE.key, 0), Computed()], GradientCame(SCORE.key, 0), "below 0"),
        ([Begun(SCORE)], VoteCame(SCORE.key), "a vote on round"),
        (STARTED, VoteCame(TICK.key), "before 3 of its gradients"),
        (STARTED, COMMIT, "no tick of stage 1 has voted"),
        ([*STARTED, *VOTED], VoteCame(TICK.key), "came twice"),
        ([*STARTED, *VOTED, COMMIT], COMMIT, "no tick of stage 1 has voted"),
        ([*STARTED, *VOTED], Decided(Decide(outcome=Outcome.RETRY)), "outcome 3"),
        ([*STARTED, *VOTED], Decided(Decide(outcome=99)), "outcome 99"),
        ([*STARTED, *VOTED, COMMIT, Computed()], GradientCame(TICK.key, 0), "open are \\[\\]"),
        ([], Lost(), "never started"),
        ([Begun(SCORE), ActivationCame(SCORE.key, 0)], Lost(), "score 0 .* refers to what is not held"),
        ([Begun(PROBE), ActivationCame(PROBE.key, 0)], Lost(), "forward 0 .* refers to what is not held"),
        ([*LOST, ActivationCame(TICK.key, 0)], Lost(), "activation 0 .* was lost again"),
        ([*LOST, ActivationCame(TICK.key, 0)], ActivationCame(TICK.key, 0), "activation 0 .* came twice"),
        (STARTED, ResendAsked(TICK.key, 2), "request for activation 2 .* only those below 2"),
        ([*STARTED, ResendAsked(TICK.key, 1)], ResendAsked(TICK.key, 1), "request for activation 1 .* came twice"),
        ([*STARTED, GradientCame(TICK.key, 0)], ResendAsked(TICK.key, 0), "after its gradient came"),
        ([Begun(SCORE), ActivationCame(SCORE.key, 0), Computed()], ResendAsked(SCORE.key, 0), "below 0"),
        ([], ResendAsked(TICK.key, 0), "a frame of round"),
        ([Begun(PROBE)], VoteCame(PROBE.key), "a vote on round"),
    ],
)
def test_what_the_protocol_does_not_allow(before: list[Event], event: Event, message: str) -> None:
    schedule = Schedule(1, 3)
    fed(schedule, *before)
    with pytest.raises(ProtocolError, match=message) as caught:
        schedule.handle(event)
    assert isinstance(caught.value, BadFrame)  # so that the peer is told, in one line
    assert "\n" not in str(caught.value)


def test_stage_0_takes_no_activation() -> None:
    schedule = Schedule(0, 2)
    schedule.handle(Begun(TICK))
    with pytest.raises(ProtocolError):
        schedule.handle(ActivationCame(TICK.key, 0))
