"""When the compute thread counts as stuck, under a virtual clock."""

from __future__ import annotations

from swarm_worker.vitals import FIRST_S, LEAST_S, TIMES, Toil


def test_the_limit_of_a_command_follows_the_longest_of_its_kind() -> None:
    now = [0.0]
    toil = Toil(lambda: now[0])
    assert toil.stuck() == "" and toil.limit_s("backward") == FIRST_S
    with toil.over("backward"):
        now[0] += FIRST_S - 1
        assert toil.stuck() == ""
        now[0] += 2
        assert "in backward for 601 s, at most 600 expected" in toil.stuck()
        now[0] -= 591
    assert toil.stuck() == "" and toil.limit_s("backward") == TIMES * 10.0
    with toil.over("forward"):
        now[0] += 0.5
    assert toil.limit_s("forward") == LEAST_S and toil.limit_s("apply and save") == FIRST_S
    with toil.over("forward"):
        now[0] += LEAST_S + 1
        assert "in forward for 61 s" in toil.stuck()
    assert toil.limit_s("forward") == TIMES * (LEAST_S + 1), "it was no end, and so it may take that long again"
