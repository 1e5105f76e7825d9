"""The journal: on disk when `write` returns, and after a crash exactly the ticks before the checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from swarm_core.wire.messages import Decide, Mode, Outcome
from swarm_worker.journal import Journal
from swarm_worker.schedule import Stamp


def stamp(tick: int, **fields: Any) -> Stamp:
    return Stamp(epoch=1, tick=tick, lineage=(1 << 63) + tick, mode=Mode.TRAIN, batch=tick // 2, pass_=1, **fields)


COMMIT = Decide(outcome=Outcome.COMMIT, coefficient=0.1)


def written(path: Path, *ticks: int) -> str:
    journal = Journal(path, 0)
    for tick in ticks:
        journal.write(stamp(tick), COMMIT, 1.5)
    journal.close()
    return path.read_text()


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_line_says_everything_that_was_decided(tmp_path: Path) -> None:
    path = tmp_path / "run" / "journal.jsonl"  # the folder is made
    journal = Journal(path, 0)
    decide = Decide(outcome=Outcome.SKIP, coefficient=0.1, reason="gate")
    journal.write(
        stamp(7, slice=1, microbatches=4, basis_version=3, correction=2, step=5, attempt=6), decide, 0.1 + 0.2
    )
    (line,) = lines(path)  # readable before it is closed
    assert line == {
        "epoch": 1, "tick": 7, "attempt": 6, "lineage": "8000000000000007", "batch": 3, "pass": 1, "slice": 1,
        "step": 5, "microbatches": 4, "basis_version": 3, "correction": 2, "outcome": "SKIP", "reason": "gate",
        "coefficient": (0.1).hex(), "grad_norm": 0.1 + 0.2,
    }  # fmt: skip
    assert float.fromhex(line["coefficient"]) == 0.1
    journal.close()


def test_a_fault_is_said_where_there_is_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", 0)
    skip = Decide(outcome=Outcome.SKIP, reason="nonfinite")
    journal.write(stamp(1), skip, float("inf"), "stage 1, microbatch 3, tick 1: NaN")
    journal.write(stamp(2), COMMIT, 1.0)
    journal.close()
    first, second = lines(tmp_path / "journal.jsonl")
    assert first["fault"] == "stage 1, microbatch 3, tick 1: NaN" and "fault" not in second


def test_every_line_is_on_disk_before_write_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, 0)
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        assert os.path.samestat(os.fstat(descriptor), path.stat())
        synced.append(path.read_text())

    monkeypatch.setattr(os, "fsync", fsync)
    for tick in range(3):
        journal.write(stamp(tick), COMMIT, 1.0)
        assert len(synced) == tick + 1
        assert synced[-1] == path.read_text() and synced[-1].endswith("\n")  # nothing was left in a buffer
        assert json.loads(synced[-1].splitlines()[-1])["tick"] == tick
    journal.close()


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), float("-inf")])
def test_a_norm_that_is_no_number_is_still_json(tmp_path: Path, norm: float) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, 0)
    journal.write(stamp(0), Decide(outcome=Outcome.SKIP, reason="nonfinite"), norm)
    journal.close()
    assert lines(path)[0]["grad_norm"] is None


@pytest.mark.parametrize("resume_at", [0, 1, 3, 5, 9])
def test_a_resume_keeps_exactly_the_ticks_before_it(tmp_path: Path, resume_at: int) -> None:
    path = tmp_path / "journal.jsonl"
    before = written(path, *range(5)).splitlines(True)
    Journal(path, resume_at).close()
    assert path.read_text() == "".join(before[:resume_at])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_torn_last_line_goes_and_the_next_one_stands_alone(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    whole = written(path, 0, 1, 2)
    path.write_text(whole[: -len(whole.splitlines(True)[-1])] + whole.splitlines()[-1][:cut])
    journal = Journal(path, 9)
    journal.write(stamp(2), COMMIT, 2.5)
    journal.close()
    assert [line["tick"] for line in lines(path)] == [0, 1, 2]
    assert lines(path)[-1]["grad_norm"] == 2.5


def test_a_line_that_only_lost_its_end_is_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(written(path, 0, 1)[:-1])
    journal = Journal(path, 2)
    journal.write(stamp(2), COMMIT, 1.0)
    journal.close()
    assert [line["tick"] for line in lines(path)] == [0, 1, 2]


@pytest.mark.parametrize(
    "garbage", [b"\0\0\0\0", b"\xff\xfe\x80", b"12\n", b'"text"\n', b"[]\n", b'{"tick": null}\n', b"{}\n"]
)
def test_garbage_behind_a_power_cut_goes(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    whole = written(path, 0, 1)
    path.write_bytes(whole.encode() + garbage)
    Journal(path, 2).close()
    assert path.read_text() == whole


def test_a_crash_during_the_cut_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    whole = written(path, 0, 1, 2)

    def crash(descriptor: int) -> None:
        raise OSError("no power")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="no power"):
        Journal(path, 2)
    assert path.read_text() == whole
