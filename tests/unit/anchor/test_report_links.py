"""What the report says about the links: the numbers of the metrics rows, drawn as they are, and nothing where none are."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from anchor_node.drawing import draw
from anchor_node.link_plots import first_version, link_plans
from anchor_node.record import LedgerRow, RunRecord, ledger_summary
from anchor_node.tables import basis_table, byte_table, probe_table, skip_table

PLACES = [(direction, boundary) for direction in ("forward", "backward") for boundary in (0, 1)]


def tick_row(tick: int, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "tick", "tick": tick, "outcome": "commit", "policy/kl_old": 0.01 * (tick % 2)}
    for place, (direction, boundary) in enumerate(PLACES):
        row[f"basis/share_{direction}/boundary_{boundary}"] = 0.9 - 0.1 * place - tick / 500
        row[f"basis/error_{direction}/boundary_{boundary}"] = 0.15 + 0.1 * place + tick / 500
    return row | changes


def probed(tick: int, kl: float) -> dict[str, Any]:
    stages = {f"fidelity/grad_cosine/stage_{stage}": 1.0 - kl * (3 - stage) for stage in range(3)}
    ratios = {f"fidelity/grad_norm_ratio/stage_{stage}": 1.0 + kl for stage in range(3)}
    return {"fidelity/kl": kl, "fidelity/kl_max": 10 * kl, "fidelity/logp_diff_max": 0.5, **stages, **ratios}


def basis_event(tick: int, rank: int, step: float) -> dict[str, Any]:
    event: dict[str, Any] = {"type": "event", "tick": tick, "event": "basis", "message": ""}
    for direction, boundary in PLACES:
        name = f"{direction}/boundary_{boundary}"
        event |= {f"basis/overlap_{name}": 0.9 + tick / 1000, f"basis/rank_{name}": rank, f"basis/step_{name}": step}
    return event


def run_of(ticks: list[dict[str, Any]], events: list[dict[str, Any]] | None = None) -> RunRecord:
    config = {"links": {"step_forward": 0.5, "step_backward": 0.5}, "grpo": {"sampler_correction_cap": 2.0},
              "dgg": {"tau": 0.5}}  # fmt: skip
    manifest = {"config": config, "ranks": {"forward": 24, "backward": 48}}
    return RunRecord(Path("run"), ticks, [], events or [], manifest, [], 1.0, [])


def panels(record: RunRecord) -> dict[str, dict[str, Axes]]:
    """Figure -> title -> panel, drawn on bare axes."""
    drawn = {}
    for plan in link_plans(record):
        axes = [Figure().add_subplot() for _ in range(plan.panels)]
        assert plan.draw(axes, record)
        drawn[plan.key] = {ax.get_title(): ax for ax in axes}
    return drawn


def lines(ax: Axes) -> dict[str, list[float]]:
    """Values by label; of those without one only the first."""
    found: dict[str, list[float]] = {}
    for line in ax.get_lines():
        found.setdefault(str(line.get_label()), [float(y) for y in line.get_ydata()])
    return found


def cells(table: str, name: str) -> list[list[str]]:
    body = table[table.index(f'<table id="{name}"') :]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", body.replace("\u00a0", " "))
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]


def test_a_run_without_such_numbers_has_no_such_figure() -> None:
    record = run_of([{"type": "tick", "tick": 0, "reward": 0.5}])
    assert link_plans(record) == []
    assert [basis_table(record), probe_table(record), skip_table(record)] == ["", "", ""]


def test_the_loss_is_the_error_and_what_lies_outside_the_basis() -> None:
    drawn = panels(run_of([tick_row(tick) for tick in range(5)]))
    assert list(drawn) == ["basis"] and list(drawn["basis"]) == ["forward, rank 24", "backward, rank 48"]
    backward = drawn["basis"]["backward, rank 48"]
    found = lines(backward)
    assert found["boundary 0"] == pytest.approx([0.35 + tick / 500 for tick in range(5)])
    assert found["boundary 1"] == pytest.approx([0.45 + tick / 500 for tick in range(5)])
    assert found["_"] == pytest.approx([0.3 + tick / 500 for tick in range(5)]), "1 - captured share"
    assert backward.get_ylim()[0] == 0.0


def test_a_run_from_before_errors_were_measured_shows_its_shares() -> None:
    rows = [{key: value for key, value in tick_row(0).items() if "error" not in key}]
    found = lines(panels(run_of(rows))["basis"]["forward, rank 24"])
    assert found == {"boundary 0": pytest.approx([0.1]), "boundary 1": pytest.approx([0.2])}
    assert "relative error" not in basis_table(run_of(rows))


def test_probes_are_drawn_where_they_were_taken() -> None:
    kls = {0: 0.01, 4: 0.02}
    ticks = [tick_row(tick, **(probed(tick, kls[tick]) if tick in kls else {})) for tick in range(6)]
    ticks[5]["fidelity/poisoned"] = 1
    record = run_of(ticks)
    drawn = panels(record)["fidelity"]
    assert list(drawn) == ["KL of the policy", "Log-prob difference", "Gradient cosine", "Gradient norm ratio"]
    kl = drawn["KL of the policy"]
    assert lines(kl)["mean"] == [0.01, 0.02] and lines(kl)["largest"] == [0.1, 0.2]
    assert lines(kl)["own updates, mean"] == pytest.approx([0.01, 0.01]), "of the passes that had any"
    assert kl.get_yscale() == "log"
    marks = {str(line.get_label()): list(line.get_xdata()) for line in kl.get_lines()}
    assert marks["mean"] == [0, 4] and marks["met NaN"] == [5]
    assert lines(drawn["Log-prob difference"])["sampler correction’s cap of 2"][0] == pytest.approx(math.log(2.0))
    assert lines(drawn["Gradient cosine"])["stage 1"] == pytest.approx([0.98, 0.96])
    assert cells(probe_table(record), "probes") == [
        ["tick", "KL, nats", "largest", "log-prob difference", "cosine, stage 0", "cosine, stage 1", "cosine, stage 2"],
        ["0", "0.01", "0.1", "0.5", "0.970", "0.980", "0.990"],
        ["4", "0.02", "0.2", "0.5", "0.940", "0.960", "0.980"],
        ["5", "met NaN", "–", "–", "–", "–", "–"],
    ]


@pytest.mark.parametrize("row", [{"fidelity/poisoned": 1}, {"fidelity/kl": 0.0, "fidelity/kl_max": 0.0}])
def test_probes_without_a_positive_number_can_be_drawn(row: dict[str, Any]) -> None:
    record = run_of([{"type": "tick", "tick": 0, **row}])
    (plan,) = link_plans(record)
    drawing = draw(plan, record)
    assert plan.panels == 1 and drawing.wide and "nats a token" in drawing.wide


def test_versions_are_drawn_when_they_say_something() -> None:
    ticks = [tick_row(tick) for tick in range(20)]
    twice = [basis_event(5, 24, 0.5), basis_event(10, 24, 0.5)]
    for event in twice:
        event |= {key: 48 for key in event if key.startswith("basis/rank_backward")}
    assert "versions" not in panels(run_of(ticks, twice)), "two that changed nothing are a table"
    steered = [*twice, basis_event(15, 20, 0.7)]
    drawn = panels(run_of(ticks, steered))["versions"]
    assert list(drawn) == ["Overlap with the version before", "Rank", "Quantiser step"]
    assert lines(drawn["Rank"])["boundary 1"] == [24, 24, 24, 20], "version 0 has the manifest's"
    assert lines(drawn["Quantiser step"])["boundary 0"] == [0.5, 0.5, 0.5, 0.7]
    assert lines(drawn["Overlap with the version before"])["boundary 0"] == pytest.approx([0.905, 0.91, 0.915])
    assert next(iter(panels(run_of(ticks, steered))["basis"])) == "forward, up to rank 24"
    for event in steered:
        event |= {f"basis/condition_{direction}/boundary_{boundary}": 5.0 + boundary for direction, boundary in PLACES}
    assert lines(panels(run_of(ticks, steered))["versions"]["Condition"])["boundary 1"] == [6.0, 6.0, 6.0]
    assert [row[-1] for row in cells(basis_table(run_of(ticks, steered)), "bases")] == ["highest condition", *"5656"]


def test_each_basis_in_numbers() -> None:
    ticks = [tick_row(tick) for tick in range(20)]
    table = basis_table(run_of(ticks, [basis_event(10, 20, 0.7), basis_event(15, 20, 0.25)]))
    assert "3 versions" in table.replace("\u00a0", " ")
    rows = cells(table, "bases")
    assert rows[0] == ["boundary", "direction", "captured share", "relative error", "rank", "step", "lowest overlap"]
    # Means of ticks 0, 1 and of 18, 19.
    assert rows[1] == ["boundary 0", "forward", "89.9 % → 86.3 %", "15.1 % → 18.7 %", "24 → 20", "0.5 → 0.25", "0.910"]
    assert rows[4][:3] == ["boundary 1", "backward", "59.9 % → 56.3 %"] and rows[4][4] == "48 → 20"


def test_a_quantiser_without_a_step_has_none() -> None:
    record = run_of([tick_row(0)], [basis_event(10, 24, 0.0)])
    assert not [key for key in first_version(record) if "step" in key]
    assert "step" not in cells(basis_table(record), "bases")[0]


def test_a_skipped_tick_says_what_happened() -> None:
    told = "stage 1, microbatch 3, tick 2: <NaN>"
    ticks = [
        tick_row(0),
        tick_row(1, outcome="skip", skip_reason="gate", **{"dgg/z": 1.75}),
        tick_row(2, outcome="skip", skip_reason="nonfinite", fault=told, **{"dgg/z": 0.1}),
        tick_row(3, outcome="skip", skip_reason="no_signal"),
    ]
    table = skip_table(run_of(ticks))
    assert "<details open>" in table and "3 skipped ticks" in table
    assert cells(table, "skips")[1:] == [
        ["1", "gate", "z = 1.75, above τ = 0.5"],
        ["2", "nonfinite", "stage 1, microbatch 3, tick 2: &lt;NaN&gt;"],
        ["3", "no_signal", ""],
    ]
    assert "<details>" in skip_table(run_of(ticks[:2])), "the gate at work is no news"


def test_both_shares_of_dense() -> None:
    rows = [
        LedgerRow(0, "stage0-stage1", "down", "activation", 1000, 50, 60, 70, 1),
        LedgerRow(0, "stage0-stage1", "up", "gradient", 1000, 100, 110, 120, 1),
        LedgerRow(0, "stage0-stage1", "down", "fidelity", 0, 30, 40, 50, 1),
        LedgerRow(0, "anchor-stage0", "down", "basis", 70, 70, 80, 90, 1),
        LedgerRow(0, "stage0-stage1", "up", "control", 5, 5, 6, 7, 1),
    ]
    summary = ledger_summary(rows)
    assert (summary.link.message_share, summary.full.message_share) == (0.085, 0.145)
    assert (summary.full.dense, summary.full.wire, summary.full.frames) == (2000, 330, 4)
    assert summary.full_text == "14.5 % with bases and fidelity probes"
    assert ["with upkeep", "", "+ basis + fidelity", "2.0 kB", "250 B", "290 B", "330 B", "14.5 %", "4"] in cells(
        byte_table(summary), "ledger"
    )
    assert ledger_summary(rows[:2]).full_text == "" and "with upkeep" not in byte_table(ledger_summary(rows[:2]))
    assert ledger_summary(rows[2:]).full_text == "", "no share of nothing"
    assert ledger_summary([*rows, rows[3]._replace(wire=None)]).full.wire is None
