"""What a stage takes for the vote of those behind it."""

from __future__ import annotations

import pytest

from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import StageVote, Vote
from swarm_worker.compute import Tally
from swarm_worker.correcting import SUMS, summed
from swarm_worker.voting import Ballot


def test_the_votes_of_all_stages_behind_go_on_with_its_own() -> None:
    ballot = Ballot(1)
    ballot.tallied(Tally([1.0], "", False, {}))
    ballot.came(Vote([StageVote(2), StageVote(3)], gated=True))
    vote = ballot.cast(5, 0.1, [7])
    assert [v.stage for v in vote.votes] == [1, 2, 3] and vote.gated


@pytest.mark.parametrize("stages", [[], [1], [0, 1], [3], [3, 2], [2, 2], [2, 4], [2**32 - 1]])
def test_votes_of_others_are_refused(stages: list[int]) -> None:
    with pytest.raises(BadFrame, match="stage 2 sent the votes of stages"):
        Ballot(1).came(Vote([StageVote(stage) for stage in stages]))


@pytest.mark.parametrize(("name", "value"), [("evil", 1.0), ("__class__", 1.0), ("", 1.0), ("dose_sq", -1.0)])
def test_sums_that_no_merge_gives_are_refused(name: str, value: float) -> None:
    assert summed([{SUMS + "dot": -1.0, SUMS + "dose_sq": 2.0}, {SUMS + "dose_sq": 1.0}]) is not None
    with pytest.raises(BadFrame, match="of its merge"):
        summed([{SUMS + name: value}])
