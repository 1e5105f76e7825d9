"""Which checkpoint a run goes on from: the newest that all stages say is whole, however they come, answer and go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from anchor_node.checkpoints import Checkpoint, CheckpointError
from anchor_node.resuming import Resuming
from swarm_core.wire.messages import Check, Checked, FrameKind, Saved

STAGES = 3


def name(tick: int) -> str:
    return f"tick-{tick:08d}"


def checkpoint(tick: int) -> Checkpoint:
    shards = {i: Saved(tick, name(tick), f"stage-{i}", f"{tick}/{i}", 1) for i in range(STAGES)}
    return Checkpoint(Path(name(tick)), tick, "ab", shards)


class Anchor:
    """What is asked and told."""

    def __init__(self, ticks: Sequence[int]) -> None:
        self.manifest = SimpleNamespace(stages=STAGES)
        self.stages: dict[int, int] = {}
        self.roster = SimpleNamespace(missing=lambda: [i for i in range(STAGES) if i not in self.stages])
        self.asked: list[tuple[int, str, str]] = []
        self.begun, self.events, self.failures = 0, [], []
        self.used: list[int] = []
        self.resuming = Resuming(self, [checkpoint(tick) for tick in ticks])  # type: ignore[arg-type]
        self.resuming.use = lambda c: self.used.append(c.tick)

    def post(self, box: int, kind: FrameKind, message: Any) -> None:
        assert kind is FrameKind.CHECK and isinstance(message, Check)
        self.asked.append((box, message.checkpoint, message.digest))

    def event(self, event: str, message: str) -> None:
        self.events.append(f"{event}: {message}")

    def fail(self, error: Exception) -> None:
        self.failures.append(str(error))

    def begin(self) -> None:
        if self.resuming.settled():
            self.begun += 1
            self.resuming.tell()

    def joins(self, *stages: int) -> None:
        for stage in stages:
            self.stages[stage] = stage
        if not self.roster.missing():
            self.begin()

    def answers(self, tick: int, *stages: int, wrong: str = "") -> None:
        for stage in stages:
            self.resuming.take(stage, Checked(name(tick), wrong))


def test_from_the_model_nobody_is_asked() -> None:
    anchor = Anchor([])
    anchor.joins(0, 1, 2)
    assert anchor.begun == 1 and not anchor.asked


def test_the_newest_is_taken_once_every_stage_has_found_its_shard_whole() -> None:
    anchor = Anchor([8, 4])
    anchor.joins(0, 1, 2)
    assert anchor.asked == [(i, name(8), f"8/{i}") for i in range(STAGES)]
    anchor.answers(8, 0, 2)
    assert not anchor.begun
    anchor.answers(8, 1)
    assert anchor.begun == 1 and anchor.resuming.checkpoint == checkpoint(8) and not anchor.events


def test_a_torn_one_is_passed_over_and_late_answers_about_it_count_no_more() -> None:
    anchor = Anchor([8, 4])
    anchor.joins(0, 1, 2)
    anchor.answers(8, 1, wrong="it is\ndamaged")
    assert not anchor.events, "the books are cut at the beginning"
    assert [c for _, c, _ in anchor.asked] == [name(8)] * 3 + [name(4)] * 3 and anchor.used == [4]
    anchor.answers(8, 0, 2)
    anchor.answers(4, 0, 1)
    assert not anchor.begun
    anchor.answers(4, 2)
    assert anchor.begun == 1 and anchor.resuming.checkpoint == checkpoint(4)
    assert anchor.events == [f"passed_over: {name(8)}: stage 1: it is damaged"]


def test_whoever_takes_a_place_is_asked_anew_and_the_others_are_not() -> None:
    anchor = Anchor([8])
    anchor.joins(0, 1, 2)
    anchor.answers(8, 0, 1)
    del anchor.stages[1]
    anchor.resuming.gone(1)
    anchor.answers(8, 2)
    assert not anchor.begun
    anchor.joins(1)
    assert anchor.asked[3:] == [(1, name(8), "8/1")]
    anchor.answers(8, 1)
    assert anchor.begun == 1


def test_without_any_left_the_run_fails_with_all_that_is_wrong_in_one_line() -> None:
    anchor = Anchor([8, 4])
    anchor.joins(0, 1, 2)
    anchor.answers(8, 1, wrong="a is gone")
    anchor.answers(4, 2, wrong="b is " + "x" * 5000)
    (told,) = anchor.failures
    assert f"{name(8)}: stage 1: a is gone; {name(4)}: stage 2: b is xxx" in told and len(told) < 1000
    anchor.begin()
    assert not anchor.begun, "and not from the model"


def test_one_whose_bases_cannot_be_read_is_passed_over_as_well() -> None:
    anchor = Anchor([8, 4, 2])

    def use(c: Checkpoint) -> None:
        if c.tick == 4:
            raise CheckpointError("its bases are torn")

    anchor.resuming.use = use
    anchor.joins(0, 1, 2)
    anchor.answers(8, 0, wrong="gone")
    assert anchor.resuming.checkpoint == checkpoint(2)
    anchor.answers(2, 0, 1, 2)
    assert anchor.begun == 1 and "its bases are torn" in anchor.events[1]


@pytest.mark.parametrize("stage", range(STAGES))
def test_what_nobody_was_asked_is_no_answer(stage: int) -> None:
    anchor = Anchor([8])
    anchor.answers(8, stage, wrong="gone")
    assert anchor.resuming.checkpoint == checkpoint(8)
