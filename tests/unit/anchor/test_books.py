"""The books: rows that JSON and CSV can hold, totals, and a resume that cuts off the ticks that never came to be."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from anchor_node.books import Books, check_report
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.ledger import COLUMNS
from swarm_core.wire.messages import LedgerRow, Report


def metrics(out: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (out / "metrics.jsonl").read_text().splitlines()]


def ledger(out: Path) -> list[dict[str, str]]:
    with (out / "ledger.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def row(tick: int, kind: str = "activation", dense: int = 100, packet: int = 10) -> LedgerRow:
    return LedgerRow(tick, "stage0-stage1", "down", kind, dense, packet, packet + 5, 2, packet + 99)


def kept(out: Path, ticks: int) -> None:
    """The books of a run that got through some ticks, with a basis and an evaluation after the last."""
    books = Books(out)
    for tick in range(ticks):
        books.report(Report("tick", tick, {"reward": 0.5, "lr": 3e-4}, {"outcome": "commit"}, [row(tick)]))
    books.row("eval", ticks, {"eval/accuracy": 0.5})
    books.close()


def test_a_report_becomes_a_row_and_ledger_lines(tmp_path: Path) -> None:
    books = Books(tmp_path / "run")
    numbers = {"reward": 0.1 + 0.2, "step": 3.0, "dgg/z": float("nan"), "grad_norm": float("inf"), "big": 1e300}
    made = books.report(Report("tick", 4, numbers, {"outcome": "skip"}, [row(4), row(4, "gradient", 50, 7)]))
    assert books.report(Report("ledger", 4, ledger=[row(5)])) is None
    (line,) = metrics(tmp_path / "run")
    assert line == made
    assert line.pop("time_s") >= 0
    assert line == {
        "type": "tick", "tick": 4, "outcome": "skip", "reward": 0.1 + 0.2, "step": 3, "dgg/z": None,
        "grad_norm": None, "big": 1e300,
    }  # fmt: skip
    lines = ledger(tmp_path / "run")
    assert list(lines[0]) == list(COLUMNS)
    assert lines[1] == {
        "tick": "4", "link": "stage0-stage1", "direction": "down", "kind": "gradient", "dense_bytes": "50",
        "packet_bytes": "7", "message_bytes": "12", "wire_bytes": "106", "frames": "2",
    }  # fmt: skip
    assert books.totals == {"activation": [200, 20, 30], "gradient": [50, 7, 12]}
    assert books.link_bytes(4) == (150, 17)
    assert books.link_bytes(4) == (0, 0), "asked once a tick"
    assert books.link_bytes(5) == (100, 10)
    books.close()


def test_control_bytes_are_totalled_but_are_not_the_links(tmp_path: Path) -> None:
    books = Books(tmp_path)
    books.ledger([row(1, "control"), row(1, "rollout")])
    assert books.link_bytes(1) == (0, 0) and set(books.totals) == {"control", "rollout"}
    books.close()


@pytest.mark.parametrize("resume_at", [0, 2, 5, 9])
def test_a_resume_cuts_off_the_ticks_that_never_came_to_be(tmp_path: Path, resume_at: int) -> None:
    kept(tmp_path, 5)
    before = metrics(tmp_path)
    books = Books(tmp_path)
    books.cut(resume_at)
    books.close()
    ticks = [r["tick"] for r in metrics(tmp_path) if r["type"] == "tick"]
    assert ticks == list(range(min(resume_at, 5)))
    # An evaluation of tick 5 was made of the weights after tick 4: it stays if those weights do.
    assert [r for r in metrics(tmp_path) if r["type"] == "eval"] == ([before[-1]] if resume_at >= 5 else [])
    assert [int(r["tick"]) for r in ledger(tmp_path)] == [0, 1, 2, 3, 4], "these bytes did cross"
    assert (tmp_path / "ledger.csv").read_text().count("tick") == 1  # one header


def test_a_resumed_run_goes_on_in_the_same_books_with_the_same_clock(tmp_path: Path) -> None:
    kept(tmp_path, 2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    late = json.loads(lines[-2]) | {"time_s": 1000.0}
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:-2], json.dumps(late)]) + "\n")
    books = Books(tmp_path)
    books.cut(2)
    made = books.row("tick", 2, {})
    books.ledger([row(2)])
    books.close()
    assert 1000.0 <= made["time_s"] < 1060.0
    assert [r["tick"] for r in metrics(tmp_path)] == [0, 1, 2]
    assert [r["tick"] for r in ledger(tmp_path)] == ["0", "1", "2"]


@pytest.mark.parametrize("cut", [1, 5, 15, 30])
def test_a_torn_last_line_goes(tmp_path: Path, cut: int) -> None:
    kept(tmp_path, 3)
    for name in ("metrics.jsonl", "ledger.csv"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-cut])
    Books(tmp_path).close()
    assert [r["tick"] for r in metrics(tmp_path) if r["type"] == "tick"] == [0, 1, 2]
    lines = ledger(tmp_path)
    assert [r["tick"] for r in lines] in (["0", "1", "2"], ["0", "1"])
    assert all((r["dense_bytes"], r["message_bytes"], r["frames"]) == ("100", "15", "2") for r in lines)


def test_a_ledger_line_whose_last_number_is_cut_short_goes_too(tmp_path: Path) -> None:
    books = Books(tmp_path)
    books.ledger([row(0), LedgerRow(1, "a-b", "down", "control", 1, 1, 1, 4321)])
    books.close()
    data = (tmp_path / "ledger.csv").read_bytes()
    assert data.endswith(b"4321\r\n")
    (tmp_path / "ledger.csv").write_bytes(data[:-4])
    Books(tmp_path).close()
    assert [r["frames"] for r in ledger(tmp_path)] == ["2"]


def test_garbage_behind_a_power_cut_goes(tmp_path: Path) -> None:
    kept(tmp_path, 2)
    for name in ("metrics.jsonl", "ledger.csv"):
        with (tmp_path / name).open("ab") as file:
            file.write(b"\0\0\xff\xfe")
    Books(tmp_path).close()
    assert [r["tick"] for r in metrics(tmp_path)] == [0, 1, 2]
    assert [r["tick"] for r in ledger(tmp_path)] == ["0", "1"]


def test_ticks_that_have_their_row_are_counted_and_no_others(tmp_path: Path) -> None:
    books = Books(tmp_path)
    assert books.ticks() == 0
    books.row("event", 40, {"event": "start"})
    books.close()
    kept(tmp_path, 3)
    books = Books(tmp_path)
    assert books.ticks() == 3
    books.close()


FINISHED = {"event": "finished", "message": "done", "checkpoint": "tick-00000004", "evaluation": "no"}


@pytest.mark.parametrize(
    "report",
    [
        Report("tick", 99, {"reward": 0.5}, {"outcome": "commit"}, [row(100)]),
        Report("event", 100, words=FINISHED),
        Report("event", 3, words={"event": "failed", "message": "x" * 500}),
        Report("event", 3, words={"event": "something new"}),
        Report("ledger", 3, ledger=[row(4, "fidelity")]),
    ],
)
def test_what_processes_report_is_taken(report: Report) -> None:
    check_report(report, 100)


@pytest.mark.parametrize(
    "report",
    [
        Report("tick", 102),
        Report("tick", 2**32 - 1),
        Report("ledger", 3, ledger=[row(2**32 - 1)]),
        Report("ledger", 3, ledger=[row(3, "gold")]),
        Report("ledger", 3, ledger=[LedgerRow(3, "stage0-stage1", "sideways", "activation")]),
        Report("ledger", 3, ledger=[LedgerRow(3, "x" * 300, "up", "activation")]),
        Report("tick", 3, {"time_s": 1.0}),
        Report("tick", 3, words={"type": "eval"}),
        Report("tick", 3, {"x" * 300: 1.0}),
        Report("tick", 3, words={"fault": "x" * 70_000}),
        Report("x" * 300, 3),
        Report("event", 3, words={"event": "failed"}),
        Report("event", 3, words={"event": "finished", "message": "done"}),
    ],
)
def test_what_would_stay_in_the_books_or_be_missed_there_is_refused(report: Report) -> None:
    with pytest.raises(BadFrame) as caught:
        check_report(report, 100)
    assert len(str(caught.value)) < 400
