"""Checkpoints are written beside the ticks: one at a time, none left out, and the log hears of each when it is on disk."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm_core.wire.messages import Saved
from swarm_worker import shard as shards
from swarm_worker.redo import Redo
from swarm_worker.saving import Saving
from swarm_worker.shard import Shard, ShardError, ShardWriter, read_shard, snapshot


class Gate:
    """A disk that stands still until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.began = threading.Event(), threading.Event()
        original = shards.write_shard

        def write(path: Path, shard: Shard) -> tuple[str, int]:
            self.began.set()
            assert self.open.wait(30)
            return original(path, shard)

        monkeypatch.setattr(shards, "write_shard", write)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@pytest.fixture
def redo(tmp_path: Path) -> Iterator[Redo]:
    """A log that goes on in a new file at tick 1, as it does when a checkpoint is decided."""
    log = Redo(tmp_path, 0, 2, "ab")
    log.begin(7, (0, 0))
    log.turn((1, 5))
    yield log
    log.close()


def saving(redo: Redo) -> tuple[Saving, list[Saved], list[BaseException]]:
    shards_of = ShardWriter(redo.folder.parents[1], 0, 2, "ab", 2)
    subject, said, failed = Saving(shards_of, redo, ThreadPoolExecutor(1)), [], []
    subject.said, subject.failed = said.append, failed.append
    return subject, said, failed


def of(value: float) -> Shard:
    return Shard({"w": torch.full((3,), value)}, {"tick": value})


def run(work: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(work(), 30))


async def began(gate: Gate) -> None:
    while not gate.began.is_set():
        await asyncio.sleep(0.001)


def test_nothing_waits_for_the_disk_and_the_word_comes_when_it_is_written(redo: Redo, gate: Gate) -> None:
    async def work() -> None:
        subject, said, failed = saving(redo)
        await subject.room(1)
        subject.begin(1, of(1.0))
        await began(gate)
        assert not said and not redo.has_shard((1, 5)) and "tick 1" in subject.waiting()
        gate.open.set()
        await subject.idle()
        assert [saved.tick for saved in said] == [1] and not subject.waiting() and not failed
        assert redo.bases((1, 5)) == [(1, said[0].digest), (0, "")]
        path = redo.folder.parents[1] / "checkpoints" / said[0].checkpoint / said[0].file
        assert read_shard(path, said[0].digest).tensors["w"].tolist() == [1.0] * 3

    run(work)


def test_the_next_checkpoint_waits_for_the_one_before_and_both_are_written(
    redo: Redo, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        subject, said, _ = saving(redo)
        subject.begin(1, of(1.0))
        room = asyncio.create_task(subject.room(2))
        await began(gate)
        await asyncio.sleep(0.01)
        assert not room.done() and subject.awaited == "the shard of tick 1, which is being written"
        gate.open.set()
        await room
        assert not subject.awaited
        subject.begin(2, of(2.0))
        await subject.idle()
        assert [saved.tick for saved in said] == [1, 2]

    with caplog.at_level(logging.WARNING, "swarm_worker.saving"):
        run(work)
    assert [record.message for record in caplog.records] == [
        "the checkpoint of tick 2 waits for the shard of tick 1, which is being written"
    ]


def test_whoever_waits_may_be_cut_off_and_the_writing_goes_on(redo: Redo, gate: Gate) -> None:
    async def work() -> None:
        subject, said, _ = saving(redo)
        subject.begin(1, of(1.0))
        room = asyncio.create_task(subject.room(2))
        await began(gate)
        room.cancel()
        await asyncio.wait({room})
        gate.open.set()
        await subject.close(30.0)
        assert [saved.tick for saved in said] == [1] and not subject.awaited

    run(work)


def test_nobody_is_told_of_a_shard_before_the_log_has_noted_it(redo: Redo) -> None:
    async def work() -> None:
        subject, _, _ = saving(redo)
        known: list[bool] = []

        def said(saved: Saved) -> None:
            other = Redo(redo.folder.parents[1], 0, 2, "ab")  # as a process would find it that takes this one's place
            other.find()
            known.append(other.has_shard((1, 5)))

        subject.said = said
        subject.begin(1, of(1.0))
        await subject.idle()
        assert known == [True]

    run(work)


def test_what_cannot_be_written_is_told_once_and_to_whoever_waits(redo: Redo, tmp_path: Path) -> None:
    async def work() -> None:
        (tmp_path / "checkpoints").write_text("in the way")
        subject, said, failed = saving(redo)
        subject.begin(1, of(1.0))
        with pytest.raises(ShardError, match="cannot be written"):
            await subject.room(2)
        assert [type(error) for error in failed] == [ShardError] and not said
        await subject.close(1.0)

    run(work)


def test_a_disk_that_hangs_holds_no_exit_up(redo: Redo, gate: Gate) -> None:
    async def work() -> None:
        subject, said, _ = saving(redo)
        subject.begin(1, of(1.0))
        await began(gate)
        await subject.close(0.01)
        assert not said
        writers = [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
        assert writers and all(thread.daemon for thread in writers)

    run(work)
    gate.open.set()


def test_a_snapshot_does_not_move_with_training() -> None:
    weight, meta = torch.ones(2), {"gate": {"window": [1.0]}}
    copy = snapshot(Shard({"w": weight}, meta))
    weight += 1
    meta["gate"]["window"].append(2.0)
    assert copy.tensors["w"].tolist() == [1.0, 1.0] and copy.meta == {"gate": {"window": [1.0]}}
