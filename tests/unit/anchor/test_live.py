"""The live table: what it shows of the rows it is fed, and that nothing it is fed can end a run."""

from __future__ import annotations

import io
import logging
import re
from typing import Any

import pytest
from rich.console import Console

from anchor_node.live import LiveTable
from anchor_node.record import ledger_summary

ESCAPE = "\x1b"


def tick_row(tick: int, **changes: Any) -> dict[str, Any]:
    return {
        "type": "tick", "tick": tick, "batch": tick // 4, "pass": 1 + tick % 4 // 2, "slice": tick % 2, "outcome": "commit",
        "skip_reason": None, "time_s": 0.5 * tick, "tick_s": 0.5, "reward": 0.25 + tick / 1000, "entropy": 1.125,
        "clip_ratio/region_mean": 0.031, "dgg/z": None, "dgg/gated": 0, "tokens_per_s": 12345.6,
    } | changes  # fmt: skip


def eval_row(tick: int, accuracy: float) -> dict[str, Any]:
    return {"type": "eval", "tick": tick, "eval/accuracy": accuracy, "eval/accuracy_compressed": accuracy - 0.03125,
            "eval/interval95": 0.05}  # fmt: skip


def piped(**options: Any) -> tuple[LiveTable, io.StringIO]:
    out = io.StringIO()
    return LiveTable("run-a", stages=3, console=Console(file=out, force_terminal=False), **options), out


def on_terminal(width: int = 120, **options: Any) -> tuple[LiveTable, io.StringIO]:
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=True, width=width, height=40, color_system="standard", legacy_windows=False
    )
    return LiveTable("run-a", stages=3, links="2 links, rank 24/48", console=console, **options), out


def drawn(table: LiveTable) -> list[str]:
    """What `render` shows, as text lines without styles."""
    console = Console(file=io.StringIO(), width=table.console.width, force_terminal=False)
    console.print(table.render())
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_a_pipe_gets_one_plain_line_a_tick() -> None:
    table, out = piped(target_ticks=8)
    with table:
        for tick in range(3):
            table.bytes_update({"activation": [1000, 50, 60]}, {tick: [1000, 50]})
            table.update(tick_row(tick))
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert ESCAPE not in out.getvalue()
    assert lines[2].startswith("tick 2 (3/8)  batch/pass 0/2  reward 0.252  entropy 1.125  clip 3.1 %")
    assert "link/tick 50 B  of dense 5.00 %  tok/s 12,346  s/tick 0.50" in lines[2]


def test_events_and_evaluations_have_their_line_too() -> None:
    table, out = piped()
    table.update(eval_row(4, 0.5))
    table.update({"type": "event", "tick": 4, "event": "basis", "message": "version 2\nadopted"})
    assert out.getvalue().splitlines() == [
        "validation 50.0 ±5.0 % at tick 4 (46.9 % through compressed links)",
        "event tick 4: basis: version 2 adopted",
    ]


def test_no_reward_is_a_dash_and_why_stays_in_sight() -> None:
    failed = {
        "type": "event",
        "tick": 3,
        "event": "verifier_failed",
        "message": "batch 1: 8 of 8 verifier calls raised: x",
    }
    for table, out in (piped(), on_terminal()):
        table.update(tick_row(3, reward=None))
        table.update(failed)
        table.update({"type": "event", "tick": 3, "event": "basis", "message": "version 1"})
        text = out.getvalue() if table.plain else "\n".join(drawn(table))
        assert "8 of 8 verifier calls raised: x" in text and "0.000" not in text
        assert "reward –" in text if table.plain else re.search(r"\n\s+3\s+0/2\s+–", text)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("to_terminal", [True, False])
def test_log_lines_go_above_the_table_and_not_through_it(to_terminal: bool) -> None:
    table, out = on_terminal()
    stderr = Screen() if to_terminal else io.StringIO()
    plain = logging.StreamHandler(stderr)
    root = logging.getLogger()
    root.addHandler(plain)
    try:
        with table:
            root.warning("[0, 1] of %s", "two")
        root.warning("afterwards")
        assert plain in root.handlers
    finally:
        root.removeHandler(plain)
    assert ("[0, 1] of two" in out.getvalue()) is to_terminal
    assert stderr.getvalue() == ("" if to_terminal else "[0, 1] of two\n") + "afterwards\n"


def test_what_a_peer_writes_cannot_move_the_cursor() -> None:
    for table, out in (piped(), on_terminal()):
        table.update({"type": "event", "tick": 4, "event": "stop", "message": f"bad {ESCAPE}[2J\rpeer"})
        table.update(tick_row(1, outcome=f"{ESCAPE}[31mcommit"))
        assert ESCAPE not in out.getvalue()
        assert all(ESCAPE not in line for line in drawn(table))


def test_the_terminal_shows_the_last_ticks_with_the_header() -> None:
    table, _ = on_terminal(target_ticks=40, rows=12)
    for tick in range(20):
        table.update(tick_row(tick))
    table.update(tick_row(20, outcome="skip", skip_reason="gate", **{"dgg/z": 1.5, "dgg/gated": 1}))
    table.update(eval_row(20, 0.75))
    table.update({"type": "event", "tick": 20, "event": "dropped_batch", "message": "batch 5 is too old"})
    lines = drawn(table)
    assert "run-a" in lines[0] and "3 stages" in lines[0] and "2 links, rank 24/48" in lines[0]
    assert "21 of 40 ticks, 1 skipped" in lines[1] and "about 00:09 to go" in lines[1]
    rows = [line for line in lines if re.match(r"\s+\d+\s+\d+/\d", line)]
    assert [int(line.split()[0]) for line in rows] == list(range(9, 21))
    assert re.split(r"\s{2,}", rows[-1].strip())[:8] == [
        "20", "5/1", "0.270", "75.0 %", "1.125", "3.1 %", "+1.50", "gate"
    ]  # fmt: skip
    assert any(line.startswith("error") and "batch 5 is too old" in line for line in lines)
    assert any(line.startswith("validation") and "75.0 ±5.0 % at tick 20" in line for line in lines)


def test_link_bytes_of_a_tick_and_of_the_run() -> None:
    table, _ = on_terminal()
    table.update(tick_row(7))
    totals = {"activation": [2000, 90, 100], "gradient": [2000, 190, 200], "weights": [9000, 9000, 9000]}
    table.bytes_update(totals, {7: [4000, 280]})
    lines = drawn(table)
    assert any("280 B" in line and "7.00 %" in line for line in lines)
    assert any(line.startswith("links") and "300 B sent, 7.50 % of dense" in line for line in lines)


def test_link_bytes_that_come_with_the_next_tick() -> None:
    late = {"bytes/links_previous_tick": 150, "bytes/share_of_dense": 0.075}
    table, _ = on_terminal()
    for tick in range(3):
        table.update(tick_row(tick, **(late if tick else {})))
    rows = [line for line in drawn(table) if re.match(r"\s+\d+\s+\d+/\d", line)]
    assert ["150 B" in row and "7.50 %" in row for row in rows] == [True, True, False]
    assert any(line.startswith("links") and "300 B sent, 7.50 % of dense" in line for line in drawn(table))
    plain, out = piped()
    plain.update(tick_row(1, **late))
    assert out.getvalue().rstrip().endswith("links of tick 0: 150 B, 7.50 % of dense")


def test_totals_may_be_a_ledger_summary() -> None:
    columns = (
        "tick",
        "link",
        "direction",
        "kind",
        "dense_bytes",
        "packet_bytes",
        "message_bytes",
        "wire_bytes",
        "frames",
    )
    values = (1, "stage0-stage1", "down", "activation", 1000, 90, 125, "", 1)
    table, _ = on_terminal()
    table.bytes_update(ledger_summary([dict(zip(columns, values, strict=True))]))
    assert any("125 B sent, 12.5 % of dense" in line for line in drawn(table))


@pytest.mark.parametrize("width", [20, 50, 80, 110, 200])
def test_no_cell_is_cut_at_any_width(width: int) -> None:
    table, _ = on_terminal(width)
    for tick in range(99_999, 100_002):
        table.update(tick_row(tick))
    rows = [line for line in drawn(table) if "100001" in line]
    assert len(rows) == 1 and "…" not in rows[0] and "100.251" in rows[0]
    assert all(len(line) <= width for line in drawn(table))
    shown = len(re.split(r"\s{2,}", rows[0].strip()))
    assert shown == {20: 2, 50: 5, 80: 8, 110: 12, 200: 12}[width]


def test_a_repeated_tick_replaces_its_row() -> None:
    table, _ = on_terminal()
    table.update(tick_row(3, reward=0.111))
    table.update(tick_row(3, reward=0.999))
    text = "\n".join(drawn(table))
    assert "0.999" in text and "0.111" not in text


def test_memory_does_not_grow_with_the_run() -> None:
    table, _ = on_terminal(rows=5)
    by_tick: dict[int, list[int]] = {}
    for tick in range(3000):
        by_tick[tick] = [100, 10]
        table.bytes_update({"activation": [100, 10, 11]}, {tick: by_tick[tick]} if tick % 500 else by_tick)
        table.update(tick_row(tick))
        if tick % 3 == 0:
            table.update(eval_row(tick, 0.5))
    assert len(table._ticks) == 5 and len(table._sizes) <= 6 and len(table._evals) <= 334


@pytest.mark.parametrize("row", [
    {}, {"type": "tick"}, {"type": "tick", "tick": "seven"}, {"type": "tick", "tick": float("nan")},
    {"type": "tick", "tick": 10**400}, {"type": "eval", "tick": None}, {"type": "event"}, {"type": 3, "tick": 3},
    {"type": "tick", "tick": 1, "reward": "high", "dgg/z": float("inf"), "tick_s": None, "batch": [], "outcome": 7},
])  # fmt: skip
def test_bad_rows_do_not_end_the_run(row: dict[str, Any]) -> None:
    for table, _ in (piped(target_ticks=5), on_terminal(target_ticks=5)):
        table.update(row)
        broken: Any = {"activation": None, "gradient": ["a", "b"]}
        table.bytes_update(broken, broken)
        table.update(tick_row(2, reward=0.777))
        assert any("0.777" in line for line in drawn(table))


def test_a_closed_pipe_does_not_end_the_run() -> None:
    table, out = piped()
    out.close()
    table.update(tick_row(0))
    table.stop()
    assert any("0.250" in line for line in drawn(table))


def test_on_a_terminal_it_redraws_in_place_and_leaves_the_table_standing() -> None:
    table, out = on_terminal(target_ticks=3)
    with table:
        table.update(tick_row(0))
        table.update(tick_row(1, reward=0.875))
    text = out.getvalue()
    assert ESCAPE in text and "0.875" in text
    before = len(out.getvalue())
    table.update(tick_row(2))
    assert len(out.getvalue()) == before


def test_a_terminal_that_fails_leaves_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("no such terminal")

    monkeypatch.setattr("anchor_node.live.Live.start", broken)
    table, out = on_terminal()
    with table:
        table.update(tick_row(0))
    assert out.getvalue().startswith("tick 0  batch/pass 0/1  reward 0.250")


def test_a_fault_stands_beside_its_skip_and_stays_in_sight() -> None:
    told = f"stage 1, microbatch 3, tick 4: 12 numbers are NaN{ESCAPE}[2J"
    for table, out in (piped(), on_terminal()):
        table.update(tick_row(4, outcome="skip", skip_reason="nonfinite", fault=told))
        table.update(tick_row(5))
        if table.plain:
            skipped, after = out.getvalue().splitlines()
            assert "outcome nonfinite" in skipped and skipped.endswith("fault: " + told.replace(ESCAPE, " "))
            assert "fault" not in after
        else:
            assert any(re.match(r"skipped\s+stage 1, microbatch 3, tick 4", line) for line in drawn(table))


def test_the_last_probe_of_the_links_is_shown() -> None:
    numbers = {"fidelity/kl": 0.01234, "fidelity/grad_cosine/stage_0": 0.71, "fidelity/grad_cosine/stage_1": 0.975}
    said = "KL 0.012 nats a token, gradient cosine 0.71 to 0.97"
    for table, out in (piped(), on_terminal()):
        table.update(tick_row(4, **numbers))
        table.update(tick_row(5))
        if table.plain:
            assert ["fidelity " + said in line for line in out.getvalue().splitlines()] == [True, False]
        else:
            assert any(line.startswith("fidelity") and f"{said} at tick 4" in line for line in drawn(table))
        table.update(tick_row(6, **{"fidelity/poisoned": 1}))
        assert "met NaN" in (out.getvalue() if table.plain else "\n".join(drawn(table)))


def test_the_upkeep_of_the_links_is_counted_in_the_second_share() -> None:
    table, _ = on_terminal()
    table.update(tick_row(7))
    totals = {"activation": [2000, 90, 100], "gradient": [2000, 190, 200], "weights": [9000, 9000, 9000]}
    table.bytes_update(totals | {"basis": [50, 50, 60], "fidelity": [0, 30, 40]})
    lines = drawn(table)
    assert any("300 B sent, 7.50 % of dense, 10.0 % with bases and fidelity probes" in line for line in lines)
    assert any("basis 60 B, fidelity 40 B, weights 9.0 kB" in line for line in lines)
    table.bytes_update(
        totals | {"snapshot": [0, 0, 60], "correction": [0, 0, 40], "basis": [0, 0, 60], "sketch": [9, 0, 0]}
    )
    assert any("11.5 % with bases, sketches, snapshots and corrections" in line for line in drawn(table))


MERGED = {"correction/version": 3, "correction/K": 12, "correction/age": 12, "correction/c": 0.84,
          "correction/lambda": 0.41, "correction/share": 0.031, "correction/cos": -0.12}  # fmt: skip
MADE = {"type": "event", "tick": 61, "event": "correction", "message": "4", "correction/made": 4,
        "correction/snapshot_tick": 60, "correction/replay_s": 12.34, "correction/bytes": 1_200_000,
        "correction/not_before": 65}  # fmt: skip


def test_the_correction_in_use_and_the_anchors_state_are_shown() -> None:
    said = "version 3, K 12, age 12, c 0.84, lambda 0.41, share 3.10 %, cos -0.120"
    for table, out in (piped(merger="held_delta"), on_terminal(160, merger="held_delta")):
        table.update(tick_row(59, **{"anchor/wait_s": 0}))
        if not table.plain:
            assert any(re.fullmatch(r"correction\s+none yet", line) for line in drawn(table))
        table.update(MADE)
        table.update(tick_row(60, **MERGED, **{"anchor/wait_s": 0}))
        if table.plain:
            assert ["correction " + said in line for line in out.getvalue().splitlines()] == [False, False, True]
            continue
        lines = drawn(table)
        assert any(re.fullmatch(rf"correction\s+{re.escape(said)}, at tick 60", line) for line in lines)
        state = "ticks waited 0 s; correction 4 from tick 60, replayed in 12.3 s, 1.2 MB, for ticks from 65 on"
        assert any(re.fullmatch(rf"anchor\s+{state}", line) for line in lines)
        table.update(tick_row(61, **{"anchor/wait_s": 0.25}))
        table.update({"type": "event", "tick": 61, "event": "snapshot_refused", "message": "stage 1: checksum"})
        lines = drawn(table)
        assert any(f"none in the last tick; before: {said}, at tick 60" in line for line in lines)
        assert any("ticks waited 0.25 s, 1 refused; correction 4" in line for line in lines)
        assert any(line.startswith("error") and "stage 1: checksum" in line for line in lines)


def test_a_run_without_a_merger_has_no_line_about_corrections() -> None:
    table, _ = on_terminal(160)
    table.update(tick_row(0, **{"anchor/wait_s": 0}))
    assert not [line for line in drawn(table) if line.startswith(("correction", "anchor"))]
    table.update(tick_row(1, **MERGED))
    assert [line for line in drawn(table) if line.startswith("correction")], "what is merged is never hidden"


@pytest.mark.parametrize("strange", [float("nan"), None, "x", [], 10**400])
def test_strange_corrections_do_not_end_the_run(strange: Any) -> None:
    for table, _ in (piped(merger="held_delta"), on_terminal(merger="held_delta")):
        for name in MERGED:
            table.update(tick_row(1, **(MERGED | {name: strange})))
        for name in MADE:
            table.update(MADE | {name: strange})
        table.update(tick_row(2, reward=0.777))
        assert any("0.777" in line for line in drawn(table))
