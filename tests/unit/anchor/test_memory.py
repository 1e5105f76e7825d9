"""What an anchor leaves on its volume: books that stand where they were acknowledged, bases, and who may come back."""

from __future__ import annotations

import asyncio
import csv
import json
from pathlib import Path

import pytest

from anchor_node import absences
from anchor_node.absences import Absences
from anchor_node.books import Books
from anchor_node.memory import FOLDER, STATE, Memory, keep_bases, kept_bases, recall
from swarm_core.wire.messages import BasisMatrix, BasisSet, LedgerRow, Report

DIGEST = "ab" * 32


def report(tick: int) -> Report:
    return Report("tick", tick, {"reward": 0.5}, ledger=[LedgerRow(tick, "a-b", "down", "gradient", 10, 3, 4, 1, 5)])


def at_work(out: Path, booked: int) -> Books:
    """The books of a run at work with so many booked reports of member 7."""
    memory = Memory()
    memory.begin(DIGEST, 1, 1, 0, 1000.0)
    memory.enter(7, "stage 0")
    books = Books(out, memory)
    for tick in range(booked):
        books.report(report(tick))
        memory.booked["7"] = tick + 1
        books.mark()
    return books


def found(out: Path) -> tuple[list[int], list[int]]:
    """Ticks in metrics.jsonl, ticks in ledger.csv."""
    metrics = [json.loads(line)["tick"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    with (out / "ledger.csv").open() as file:
        return metrics, [int(row["tick"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("beyond", ["nothing", "a row", "a row and its bytes", "half a line"])
def test_a_killed_anchor_is_followed_by_one_whose_books_hold_what_was_acknowledged(tmp_path: Path, beyond: str) -> None:
    books = at_work(tmp_path, 3)
    if beyond == "half a line":
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"type": "ti')
    elif beyond != "nothing":
        books.row("tick", 3, {})
        if beyond == "a row and its bytes":
            books.ledger(report(3).ledger)
    # kill -9: no close, no mark
    memory = recall(tmp_path, DIGEST)
    assert memory is not None and memory.booked == {"7": 3} and memory.roles == {"7": "stage 0"}
    again = Books(tmp_path, memory)
    assert found(tmp_path) == ([0, 1, 2], [0, 1, 2])
    assert again.totals == {"gradient": [30, 9, 12]} and again.link_bytes(2) == (10, 3)
    assert again.started == 1000.0, "the time without an anchor counts"
    again.report(report(3))
    assert found(tmp_path) == ([0, 1, 2, 3], [0, 1, 2, 3])
    again.close()


def test_books_that_lost_their_end_are_taken_as_they_are(tmp_path: Path) -> None:
    at_work(tmp_path, 3).close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:2]))
    Books(tmp_path, recall(tmp_path, DIGEST)).close()
    assert found(tmp_path)[0] == [0, 1]


def test_only_a_run_that_was_left_at_work_is_recalled(tmp_path: Path) -> None:
    assert recall(tmp_path, DIGEST) is None
    at_work(tmp_path, 1).close()
    assert recall(tmp_path, "cd" * 32) is None, "another manifest"
    state = tmp_path / FOLDER / STATE
    whole = state.read_text()
    state.write_text(whole[: len(whole) // 2])
    assert recall(tmp_path, DIGEST) is None, "torn"
    state.write_text(whole)
    memory = recall(tmp_path, DIGEST)
    assert memory is not None
    memory.at_work = False
    memory.save(tmp_path)
    assert recall(tmp_path, DIGEST) is None, "it has ended"


def test_a_new_start_knows_nobody_of_the_last_one(tmp_path: Path) -> None:
    memory = Memory(closing="stopped", evaluated=9, finished={"message": "done"})
    memory.enter(7, "stage 0")
    memory.begin(DIGEST, 1, 1, 20, 5.0)
    assert (memory.roles, memory.booked, memory.closing, memory.finished, memory.evaluated) == ({}, {}, "", {}, -1)
    memory.enter(8, "sampler")
    memory.booked["8"] = 4
    memory.leave(8)
    assert memory.samplers() == [] and memory.booked == {"8": 4}, (
        "what it reported is not booked again should it return"
    )
    memory.enter(8, "sampler")
    assert memory.booked == {"8": 4}


def test_bases_come_back_as_they_were_broadcast(tmp_path: Path) -> None:
    bases = BasisSet(7, 40, [BasisMatrix(0, 1, 2, 1, b"\x00\x3f\x80\x3f", b"", 0.25)])
    keep_bases(tmp_path, BasisSet(6, 20))
    keep_bases(tmp_path, bases)
    assert kept_bases(tmp_path) == bases


def test_an_absent_member_is_waited_for_as_long_as_the_run_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(absences, "GRACE_S", 0.05)
    tick = 0
    gone: list[int] = []

    async def work() -> None:
        nonlocal tick
        absent = Absences(lambda: tick)
        for member, patient in ((1, True), (2, False), (3, True)):
            absent.add(member, lambda member=member: gone.append(member), patient=patient)
        absent.back(3)
        assert 1 in absent and 3 not in absent and len(absent) == 2
        for _ in range(8):
            await asyncio.sleep(0.02)
            tick += 1
        assert gone == [2] and 1 in absent
        await asyncio.sleep(0.2)
        assert gone == [2, 1] and not absent

    asyncio.run(work())
