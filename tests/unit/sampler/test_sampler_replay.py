"""Recorded rollouts: bits in, the same bits out; whatever is not a whole record is refused or cut off."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swarm_core.learning.rollout import Completion, RolloutBatch
from swarm_worker.sampler.errors import ReplayError
from swarm_worker.sampler.replay import ReplayWriter, read_rollouts

GROUPS, SIZE = 2, 3


def rollouts(batch: int, groups: int = GROUPS, size: int = SIZE) -> RolloutBatch:
    completions = [
        Completion(
            prompt_index=10 * batch + group,
            prompt_ids=[group + 1, 2],
            completion_ids=[3 + place, 1],
            logprobs=[-0.1 - batch / 3, -1e-17],
            reward=None if place == 1 else place / 3,
            truncated=place == 2,
        )
        for group in range(groups)
        for place in range(size)
    ]
    return RolloutBatch(batch=batch, weight_version=7 * batch, group_size=size, completions=completions)


def record(path: Path, *batches: int) -> Path:
    with ReplayWriter(path, SIZE, GROUPS) as writer:
        for batch in batches:
            writer.append(rollouts(batch))
    return path


def test_what_is_written_is_read_back_exactly(tmp_path: Path) -> None:
    path = record(tmp_path / "deep" / "r.jsonl", 0, 1, 5)
    assert list(read_rollouts(path, SIZE, groups=GROUPS)) == [rollouts(0), rollouts(1), rollouts(5)]


def test_missing_logprobs_are_null_and_the_row_is_optional(tmp_path: Path) -> None:
    line = {
        "batch": 0,
        "group": 0,
        "prompt_ids": [1],
        "completion_ids": [2, 3],
        "logprobs": [None, -1],
        "reward": 1,
        "truncated": False,
        "weight_version": 0,
    }
    (tmp_path / "r.jsonl").write_text(json.dumps(line) + "\n")
    (batch,) = read_rollouts(tmp_path / "r.jsonl", 1)
    assert batch.completions[0].prompt_index == 0
    assert math.isnan(batch.completions[0].logprobs[0])
    with ReplayWriter(tmp_path / "s.jsonl", 1, 1) as writer:
        writer.append(batch)
    assert "null" in (tmp_path / "s.jsonl").read_text()


def test_the_record_goes_on_behind_its_last_batch(tmp_path: Path) -> None:
    path = record(tmp_path / "r.jsonl", 0, 1)
    before = path.read_bytes()
    with ReplayWriter(path, SIZE, GROUPS) as writer:
        assert writer.last_batch == 1
        with pytest.raises(ReplayError, match="batch 1 after batch 1"):
            writer.append(rollouts(1))
        writer.append(rollouts(2))
    assert path.read_bytes().startswith(before)
    assert [batch.batch for batch in read_rollouts(path, SIZE)] == [0, 1, 2]


def test_any_torn_tail_is_cut_back_to_the_last_whole_batch(tmp_path: Path) -> None:
    whole = record(tmp_path / "r.jsonl", 0, 1).read_bytes()
    first = record(tmp_path / "first.jsonl", 0).read_bytes()
    for cut in range(0, len(whole), 7):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(whole[:cut])
        with ReplayWriter(path, SIZE, GROUPS) as writer:
            assert writer.last_batch == (0 if cut >= len(first) else None)
        assert path.read_bytes() == (first if cut >= len(first) else b"")


def test_a_record_of_other_batch_sizes_is_not_touched(tmp_path: Path) -> None:
    path = record(tmp_path / "r.jsonl", 0, 1)
    before = path.read_bytes()
    with pytest.raises(ReplayError, match="record to another file"):
        ReplayWriter(path, SIZE, GROUPS + 1)
    assert path.read_bytes() == before


def test_the_writer_refuses_wrong_sizes_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with ReplayWriter(path, SIZE, GROUPS) as writer:
        with pytest.raises(ReplayError, match="group size 2, wanted 3"):
            writer.append(rollouts(0, size=2))
        with pytest.raises(ReplayError, match="3 groups, wanted 2"):
            writer.append(rollouts(0, groups=3))
    assert path.read_bytes() == b""


def test_a_whole_batch_comes_before_an_error_behind_it(tmp_path: Path) -> None:
    path = record(tmp_path / "r.jsonl", 0, 1)
    path.write_bytes(path.read_bytes()[:-5])
    batches = read_rollouts(path, SIZE)
    assert next(batches) == rollouts(0)
    with pytest.raises(ReplayError, match="batch 1 is torn") as caught:
        next(batches)
    assert caught.value.line == 2 * GROUPS * SIZE


def test_a_torn_recording_says_how_much_of_it_is_whole(tmp_path: Path) -> None:
    whole = record(tmp_path / "r.jsonl", 0, 1).read_bytes()
    first = len(record(tmp_path / "first.jsonl", 0).read_bytes())
    path = tmp_path / "torn.jsonl"
    for cut in range(first + 1, len(whole), 5):
        path.write_bytes(whole[:cut])
        batches = read_rollouts(path, SIZE, groups=GROUPS)
        assert next(batches) == rollouts(0), cut
        with pytest.raises(ReplayError, match=rf"batch 1 is torn.*head -n {GROUPS * SIZE} {path} > whole.jsonl"):
            next(batches)
    path.write_bytes(whole[: first - 5])
    with pytest.raises(ReplayError, match="batch 0 is torn.*no batch is whole, or record it again"):
        next(read_rollouts(path, SIZE, groups=GROUPS))


def test_empty_and_missing_records_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(b"")
    with pytest.raises(ReplayError, match="no rollout"):
        list(read_rollouts(tmp_path / "r.jsonl", SIZE))
    with pytest.raises(ReplayError, match="no such file"):
        list(read_rollouts(tmp_path / "none.jsonl", SIZE))


def test_wrong_group_sizes_are_refused(tmp_path: Path) -> None:
    path = record(tmp_path / "r.jsonl", 0)
    with pytest.raises(ReplayError, match="in group 1, wanted 0"):
        list(read_rollouts(path, 4))
    with pytest.raises(ReplayError, match="in group 0, wanted 1"):
        list(read_rollouts(path, 2))
    with pytest.raises(ReplayError, match="2 groups, wanted 5"):
        list(read_rollouts(path, SIZE, groups=5))


def change(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda line: line.update({name: value})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (change("batch", -1), "'batch' is '-1'"),
        (change("group", "0"), "'group' is '0', wanted an integer"),
        (change("weight_version", True), "'weight_version'"),
        (change("weight_version", 99), "weight_version 99 beside 0"),
        (change("prompt_ids", []), "'prompt_ids'"),
        (change("prompt_ids", [1, 3]), "two different prompts in group 0"),
        (change("row", 5), "two different prompts in group 0"),
        (change("completion_ids", [1, 2.5]), "'completion_ids'"),
        (change("completion_ids", [1]), "2 logprobs for 1 completion_ids"),
        (change("logprobs", [-1.0, math.inf]), "'logprobs'"),
        (change("reward", math.nan), "'reward' is 'nan'"),
        (change("reward", "1"), "'reward' is '1'"),
        (change("truncated", 0), "'truncated' is '0', wanted true or false"),
        (change("extra", 1), "wanted an object with the fields"),
        (lambda line: line.pop("reward"), "wanted an object with the fields"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, spoil: Callable[[dict[str, Any]], None], words: str) -> None:
    path = record(tmp_path / "r.jsonl", 0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    spoil(lines[1])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ReplayError) as caught:
        list(read_rollouts(path, SIZE))
    assert caught.value.line == 2
    assert words in str(caught.value)


def test_batches_must_rise(tmp_path: Path) -> None:
    path = record(tmp_path / "r.jsonl", 0, 1)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[GROUPS * SIZE :] + lines[: GROUPS * SIZE]))
    with pytest.raises(ReplayError, match="batch 0 after batch 1"):
        list(read_rollouts(path, SIZE))
