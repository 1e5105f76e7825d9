"""The roster: who gets a place, who is told what, and when everything is there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from anchor_node.roster import Roster
from swarm_core.wire.errors import BadFrame, ManifestMismatch, Refused, StageOutOfRange, StageTaken
from swarm_core.wire.messages import PROTOCOL, Hello, Ready, Saved

DIGEST, PRINT = "aa" * 32, "bb" * 32
READY = Ready(10, 40, PRINT)


def hello(stage: int, **fields: object) -> Hello:
    return Hello(role="stage", stage=stage, address=f"host{stage}:70", **fields)  # type: ignore[arg-type]


def full(stages: int = 3) -> Roster:
    roster = Roster(stages, DIGEST, PRINT)
    for stage in range(stages):
        roster.is_ready(roster.join(hello(stage, member=100 + stage)), READY)
    roster.start()
    return roster


def test_the_swarm_is_complete_with_the_last_ready_in_any_order() -> None:
    roster = Roster(3, DIGEST, PRINT)
    assert roster.missing() == [0, 1, 2]
    members = [roster.join(hello(stage)) for stage in (2, 0, 1)]
    assert roster.missing() == [0, 1, 2]
    assert [roster.is_ready(member, READY) for member in members] == [False, False, True]
    assert not roster.started and roster.missing() == []
    roster.start()
    assert roster.started and all(member.at_work for member in members)
    assert roster.addresses() == ["host0:70", "host1:70", "host2:70"]


def test_ready_without_the_others_is_not_complete() -> None:
    roster = Roster(2, DIGEST, PRINT)
    assert not roster.is_ready(roster.join(hello(1)), READY)
    assert not roster.started and roster.missing() == [0]


def test_a_taken_stage_names_its_holder_and_what_is_free() -> None:
    roster = Roster(3, DIGEST, PRINT)
    roster.join(hello(1))
    with pytest.raises(StageTaken, match=r"^stage 1 is already held by host1:70; free: 0, 2$"):
        roster.join(hello(1))
    with pytest.raises(StageTaken, match="every stage is held"):
        full().join(hello(0))


@pytest.mark.parametrize("stage", [3, 2**32 - 1])
def test_a_stage_that_does_not_exist(stage: int) -> None:
    with pytest.raises(StageOutOfRange, match=rf"^stage {stage} does not exist: this run has stages 0 to 2 \(run.toml"):
        Roster(3, DIGEST, PRINT).join(hello(stage))


def test_another_protocol_is_told_both_numbers_and_comes_first() -> None:
    with pytest.raises(ManifestMismatch, match=f"speaks protocol 7, this anchor {PROTOCOL}: install the same version"):
        Roster(3, DIGEST, PRINT).join(hello(99, protocol=7, manifest_digest="cc"))


def test_another_digest_is_told_both_and_what_to_do() -> None:
    roster = Roster(3, DIGEST, PRINT)
    with pytest.raises(ManifestMismatch, match=r"digest is a{12}\.\.\., the worker wants c{12}\.\.\..*--out folder"):
        roster.join(hello(0, manifest_digest="cc" * 32))
    assert roster.members == {}
    roster.join(hello(0, manifest_digest=DIGEST))
    roster.join(hello(1))  # expects nothing


def test_another_checkpoint_is_told_both_fingerprints() -> None:
    roster = Roster(1, DIGEST, PRINT)
    member = roster.join(hello(0))
    with pytest.raises(ManifestMismatch, match=r"fingerprint d{12}\.\.\., the anchor's is b{12}\.\.\..*--model"):
        roster.is_ready(member, Ready(1, 4, "dd" * 32))
    assert member.ready is None and not roster.started


def test_every_refusal_is_one_line() -> None:
    roster = full()
    for wrong in (hello(0), hello(9), hello(0, protocol=0), hello(0, manifest_digest="x")):
        with pytest.raises(Refused) as caught:
            roster.join(wrong)
        assert "\n" not in str(caught.value)


def test_a_place_that_was_left_is_free_again_and_only_its_holder_leaves_it() -> None:
    roster = Roster(2, DIGEST, PRINT)
    first = roster.join(hello(0))
    roster.leave(first)
    second = roster.join(hello(0))
    roster.leave(first)  # late, of a connection that is long gone
    assert roster.members == {0: second}


def test_a_checkpoint_is_complete_with_its_last_shard_whatever_comes_in_between() -> None:
    roster = full()
    old, new = ([Saved(t, f"tick-{t:08d}", f"s{i}", f"d{i}", i) for i in range(3)] for t in (10, 20))
    assert roster.saved(0, old[0]) is None
    assert roster.saved(0, new[0]) is None
    assert roster.saved(1, old[1]) is None
    assert roster.saved(1, old[1]) is None  # the same once more
    assert roster.saved(2, old[2]) == dict(enumerate(old))
    assert roster.saved(2, new[2]) is None
    assert roster.saved(1, new[1]) == dict(enumerate(new))


@pytest.mark.parametrize(
    ("name", "file"),
    [(n, "s") for n in ("", "../x", "a/b", "..", ".hidden", "tick-00000002")]
    + [("tick-00000001", f) for f in ("../s", "..", "")],
)
def test_a_checkpoint_name_that_leaves_its_folder_is_refused(name: str, file: str) -> None:
    with pytest.raises(BadFrame, match="stage 1 names a checkpoint"):
        full().saved(1, Saved(1, name, file, "d", 1))


def at_work(stage: int, tick: int = 40) -> Hello:
    return hello(stage, member=100 + stage, at_work=True, tick=tick, epoch=1)


def restarted(stages: int = 3) -> Roster:
    """Of an anchor that takes over from one that left these members at work."""
    return Roster(stages, DIGEST, PRINT, {100 + stage for stage in range(stages)})


def test_a_restarted_anchor_takes_over_with_the_last_member_at_work() -> None:
    roster = restarted()
    for stage in (2, 0):
        roster.join(at_work(stage))
        assert not roster.taken_over() and not roster.started and roster.at_work
    roster.join(at_work(1))
    assert roster.taken_over() and roster.started and roster.unbroken and roster.missing() == []
    assert not roster.taken_over(), "once"
    assert roster.addresses() == ["host0:70", "host1:70", "host2:70"]


def test_a_member_on_a_new_stream_is_itself() -> None:
    roster = full(2)
    first = roster.members[0]
    first.away = True
    assert roster.join(at_work(0)) is first and not first.away and first.fit
    assert roster.join(at_work(0)) is first, "its old stream need not have ended"
    with pytest.raises(StageTaken, match="already held by host0:70"):
        roster.join(hello(0, member=9))
    roster.join(hello(0, member=100, at_work=True, epoch=1, stalled=True))
    assert not first.fit, "it waits for another epoch"
    roster.epoch = 2
    roster.join(at_work(0))
    assert not first.fit, "it is in an epoch that is over"


def test_the_place_of_a_lost_stage_is_taken_by_whoever_comes_first() -> None:
    roster = full(2)
    roster.members[0].away = True
    newcomer = roster.join(hello(0, member=9))
    assert roster.members[0] is newcomer and roster.missing() == [0], "it has yet to load"
    assert roster.is_ready(newcomer, READY) and not newcomer.fit
    with pytest.raises(StageTaken, match="already held by host0:70"):
        roster.join(at_work(0))
    newcomer.away = True
    with pytest.raises(StageTaken, match="^stage 0 was given up, and another process took its place") as caught:
        roster.join(at_work(0))
    assert "\n" not in str(caught.value)


def test_an_anchor_that_is_back_takes_newcomers_with_those_at_work_but_not_as_if_nothing_had_happened() -> None:
    roster = restarted()
    for stage in range(2):
        roster.join(at_work(stage))
    newcomer = roster.join(hello(2, member=9))
    assert not roster.taken_over(), "it loads"
    assert roster.is_ready(newcomer, READY) and roster.taken_over() and not roster.unbroken
    roster = restarted()
    for stage in range(3):
        roster.is_ready(roster.join(hello(stage, member=stage + 1)), READY)
    assert not roster.taken_over(), "all anew: a start, and no run to carry on"


@pytest.mark.parametrize("known", [None, {1, 2}])
def test_a_member_at_work_is_unknown_to_an_anchor_of_another_start(known: set[int] | None) -> None:
    with pytest.raises(StageTaken, match=r"does not know it.*--resume"):
        Roster(3, DIGEST, PRINT, known).join(at_work(0))


@pytest.mark.parametrize("address", ["", "here", "10.0.0.1", "a b:1", "a\nb:1", "x" * 300 + ":1", "h:99999"])
def test_an_address_that_nobody_can_dial_is_refused(address: str) -> None:
    with pytest.raises(BadFrame, match="which is no address"):
        Roster(2, DIGEST, PRINT).join(replace(hello(0), address=address))


def test_ready_is_said_once() -> None:
    roster = Roster(1, DIGEST, PRINT)
    member = roster.join(hello(0))
    assert roster.is_ready(member, Ready(model_fingerprint=PRINT))
    with pytest.raises(BadFrame, match="ready already"):
        roster.is_ready(member, Ready(model_fingerprint=PRINT))


def test_shards_of_a_future_that_is_left_complete_no_checkpoint() -> None:
    roster = full()
    for tick in (4, 8):
        for stage in (0, 1):
            assert roster.saved(stage, Saved(tick, f"tick-{tick:08d}", "s", "of the lost future", 1)) is None
    roster.forget_saved(5)
    assert roster.saved(2, Saved(8, "tick-00000008", "s", "d", 1)) is None
    assert roster.saved(2, Saved(4, "tick-00000004", "s", "d", 1)) is not None


def test_checkpoints_that_nobody_completes_are_forgotten() -> None:
    roster = full()
    for tick in range(1000):
        roster.saved(0, Saved(tick, f"tick-{tick:08d}", "s", "d", 1))
    assert len(roster._saved) == 64 and min(roster._saved) == "tick-00000936"
