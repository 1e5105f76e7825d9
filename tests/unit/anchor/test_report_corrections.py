"""What the report says about corrections and basis refreshes: the numbers of a plausible run, exactly, and no figure,
table or claim where nothing was recorded."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from anchor_node.correction_plots import correction_plans, refresh_plans
from anchor_node.correction_sums import correction_bytes, has_corrections, merge_text, totals, version_uses
from anchor_node.correction_tables import correction_section, refresh_section
from anchor_node.drawing import Drawing, mark_refreshes
from anchor_node.plots import _policy
from anchor_node.record import LedgerRow, RunRecord, ledger_summary, read_run
from anchor_node.report import write_report

CADENCE, DELAY, BATCH = 10, 6, 8
LEDGER_HEAD = "tick,link,direction,kind,dense_bytes,packet_bytes,message_bytes,wire_bytes,frames\n"


def tick_row(tick: int, random_: random.Random, version: int, spike: float, last: int | None = None) -> dict[str, Any]:
    """A tick of a run with 4 passes of 2 slices; correction v is made of tick 10 (v - 1), merged from 6 ticks later on."""
    place, gated = tick % BATCH, tick % 29 == 28
    clip = 0.0 if place == 0 else 0.004 * place * random_.uniform(0.8, 1.2) + spike
    row = {
        "type": "tick", "tick": tick, "batch": tick // BATCH, "pass": 1 + place // 2, "slice": place % 2,
        "outcome": "skip" if gated else "commit", "skip_reason": "gate" if gated else None, "time_s": 1.5 * tick + 1.5,
        "tick_s": 1.5, "reward": 0.2 + 0.3 * tick / 160 + random_.gauss(0, 0.03), "entropy": 1.4 - tick / 400 +
        random_.gauss(0, 0.02), "completions/mean_length": 22 + random_.gauss(0, 0.6), "completions/clipped_ratio": 0.03,
        "clip_ratio/region_mean": clip, "clip_ratio/low_mean": 0.4 * clip, "clip_ratio/high_mean": 0.6 * clip,
        "grad_norm": 0.5, "loss": random_.gauss(0, 0.003), "frac_reward_zero_std": 0.3, "basis/version": version,
        "tokens_per_s": 4000.0, "anchor/wait_s": 0, "dgg/z": random_.gauss(0, 0.5), "dgg/gated": int(gated),
    }  # fmt: skip
    merged = (tick - DELAY) // CADENCE + 1
    if tick >= DELAY and (last is None or merged <= last):
        k = tick - CADENCE * (merged - 1)
        row |= {
            "correction/version": merged, "correction/K": k, "correction/age": k, "correction/c": 0.5 + 0.02 * k,
            "correction/lambda": 0.5, "correction/share": 0.25 * 0.88**k, "correction/cos": 0.4 - 0.03 * k,
        }  # fmt: skip
    return row


def correction_event(version: int) -> dict[str, Any]:
    made = CADENCE * (version - 1) + 4
    return {
        "type": "event", "tick": made, "time_s": 1.5 * made, "event": "correction", "message": f"version {version}",
        "correction/made": version, "correction/snapshot_tick": made - 4, "correction/born": made,
        "correction/not_before": made + 2, "correction/replay_s": 6.25, "correction/bytes": 120_000,
    }  # fmt: skip


def ledger_lines(ticks: int, corrections: bool) -> str:
    lines = [LEDGER_HEAD]
    for tick in range(ticks):
        lines += [f"{tick},stage0-stage1,down,activation,900000,40000,41000,,8\n",
                  f"{tick},stage0-stage1,up,gradient,900000,58000,59000,,8\n"]  # fmt: skip
        if tick % BATCH == 0:
            lines.append(f"{tick},anchor-sampler,down,weights,4000000,4000000,4010000,,5\n")
        if tick % 20 == 0:
            lines.append(f"{tick},anchor-stage0,down,basis,90000,90000,100000,,2\n")
        if corrections and tick % CADENCE == 0:
            lines += [f"{tick},anchor-stage{s},up,snapshot,2000000,150000,150000,,3\n" for s in (0, 1)]
            lines += [f"{tick},anchor-stage{s},down,correction,2000000,50000,50000,,1\n" for s in (0, 1)]
    return "".join(lines)


def plausible_run(
    folder: Path, ticks: int = 160, *, pinned: bool = True, merger: str = "held_delta", last: int | None = None
) -> Path:
    """A run folder: bases are made every 20 ticks; pinned they come with the next batch, else at once, and then the
    clip fraction is 20 points higher until the batch ends. The corrections stop after version `last`."""
    random_ = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    in_use = at_start = 0
    for tick in range(ticks):
        if tick and tick % 20 == 0:
            rows.append({"type": "event", "tick": tick, "time_s": 1.5 * tick, "event": "basis",
                         "message": f"version {tick // 20}"})  # fmt: skip
        if not pinned or tick % BATCH == 0:
            in_use = max(0, tick - 1) // 20
        at_start = in_use if tick % BATCH == 0 else at_start
        row = tick_row(tick, random_, in_use, 0.2 if in_use != at_start else 0.0, last)
        if merger == "none":
            row = {name: value for name, value in row.items() if not name.startswith(("correction/", "anchor/"))}
        rows.append(row)
        if tick % 32 == 0:
            rows.append({"type": "eval", "tick": tick, "time_s": 1.5 * tick, "eval/accuracy": 0.3 + tick / 400,
                         "eval/accuracy_compressed": 0.28 + tick / 400, "eval/interval95": 0.05})  # fmt: skip
        if merger != "none" and tick % CADENCE == 4 and (last is None or tick // CADENCE < last):
            rows.append(correction_event(tick // CADENCE + 1))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ledger.csv").write_text(ledger_lines(ticks, merger != "none"))
    config = {
        "run": {"name": "corrected", "ticks": ticks}, "model": {"path": "/models/arith"}, "swarm": {"stages": 2},
        "corrections": {"merger": merger, "k_max": 40, "lambda_cap": 0.5}, "dgg": {"tau": 0.5},
        "anchor": {"pin_basis": pinned}, "links": {"kind": "lowrank"},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps({"config": config, "ranks": {"forward": 24, "backward": 48}}))
    return folder


def run_of(
    ticks: list[dict[str, Any]], events: list[dict[str, Any]] | None = None, merger: str | None = None
) -> RunRecord:
    manifest = {"config": {"corrections": {"merger": merger}}} if merger else {}
    return RunRecord(Path("run"), ticks, [], events or [], manifest, [], 1.0, [])


def cells(page: str, name: str) -> list[list[str]]:
    body = page[page.index(f'<table id="{name}"') :]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", body[: body.index("</table>")].replace("\u00a0", " "))
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]


def words(page: str) -> str:
    return re.sub(r"<[^>]+>", " ", page).replace("\u00a0", " ")


@pytest.fixture(scope="module")
def corrected(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return read_run(plausible_run(tmp_path_factory.mktemp("corrected"), last=9))


@pytest.fixture(scope="module")
def jumped(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return read_run(plausible_run(tmp_path_factory.mktemp("jumped"), pinned=False))


def test_each_correction_has_its_row(corrected: RunRecord) -> None:
    section = correction_section(corrected, ledger_summary(corrected.ledger))
    rows = cells(section, "corrections-made")
    assert rows[0] == ["version", "snapshot tick", "K at first use", "ticks used", "c", "λ", "dose", "cosine"]
    # K runs from 6 to 15: c = 0.5 + 0.02 K, cosine = 0.4 - 0.03 K, dose = 0.25 x 0.88 ** K.
    dose = f"{sum(25 * 0.88**k for k in range(6, 16)) / 10:.1f} % · {25 * 0.88**15:.1f} %"
    assert rows[2] == ["2", "10", "6", "10 (16–25)", "0.71 · 0.8", "0.5 · 0.5", dose, "+0.085 · \u22120.050"]
    assert len(rows) == 1 + 9


def test_totals_are_those_of_the_rows(corrected: RunRecord) -> None:
    uses = version_uses(corrected)
    sums = totals(corrected, uses)
    assert (sums.made, sums.used, sums.merges, sums.ticks) == (9, 9, 90, 160)
    assert (sums.mean_k, sums.mean_age, sums.mean_lambda, sums.wait_s) == (10.5, 10.5, 0.5, 0.0)
    assert sums.skipped_merges == len([tick for tick in range(6, 96) if tick % 29 == 28])
    assert (sums.replay_median_s, sums.replay_sum_s) == (6.25, 9 * 6.25)
    text = words(correction_section(corrected, ledger_summary(corrected.ledger)))
    assert "9 corrections, 9 of them used; 90 of 160 ticks merged one (3 of them were skipped)." in text
    assert "K 10.5 ticks, age 10.5 ticks, λ 0.5, dose" in text
    assert "Ticks waited 0 s for the anchor." in text


def test_bytes_stand_beside_the_fast_path(corrected: RunRecord) -> None:
    summary = ledger_summary(corrected.ledger)
    sizes = correction_bytes(summary)
    # A tick: 100 kB on the link; snapshots 300 kB and corrections 100 kB every 10, a basis of 100 kB every 20.
    assert (sizes.fast, sizes.snapshot, sizes.correction) == (160 * 100_000, 16 * 300_000, 16 * 100_000)
    assert (sizes.with_corrections, sizes.with_upkeep) == (22_400_000, 23_200_000)
    assert sizes.times_fast(sizes.with_upkeep) == 1.45
    section = correction_section(corrected, summary)
    assert [row[1:] for row in cells(section, "correction-bytes")[1:]] == [
        ["16.0 MB", "100.0 kB", "1.00"], ["4.8 MB", "30.0 kB", "0.30"], ["1.6 MB", "10.0 kB", "0.10"],
        ["22.4 MB", "140.0 kB", "1.40"], ["800.0 kB", "5.0 kB", "0.05"], ["23.2 MB", "145.0 kB", "1.45"],
        ["103.4 MB", "646.2 kB", "6.46"],
    ]  # fmt: skip
    wanted = (
        "1.40 times the bytes of its fast path; it should be below 2, and is. With all other upkeep it is 1.45 times."
    )
    assert wanted in words(section)
    assert summary.full_text == "8.06 % with bases, snapshots and corrections"
    dear = [*corrected.ledger, LedgerRow(0, "anchor-stage0", "up", "snapshot", 0, 0, 20_000_000, None, 1)]
    assert "it should be below 2, and is not." in words(correction_section(corrected, ledger_summary(dear)))


def panels(plans: list[Any], record: RunRecord) -> dict[str, Axes]:
    (plan,) = plans
    axes = [Figure().add_subplot() for _ in range(plan.panels)]
    assert plan.draw(axes, record)
    return {ax.get_title(): ax for ax in axes}


def test_the_saw_tooth_breaks_where_nothing_was_merged() -> None:
    rows = [tick_row(tick, random.Random(0), 0, 0.0) for tick in range(40)]
    for row in (*rows[20:24], rows[25]):
        for name in [name for name in row if name.startswith("correction/")]:
            del row[name]
    drawn = panels(correction_plans(run_of(rows)), run_of(rows))
    assert list(drawn) == ["K and age", "Dose", "c and its weight λ", "Correction against own gradient"]
    line, alone = drawn["K and age"].get_lines()[:2]
    ks = [float(y) for y in line.get_ydata()]
    assert ks[:11] == [6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 6]
    assert [i for i, k in enumerate(ks) if math.isnan(k)] == [14, 16], (
        "before tick 24, which stands alone, and behind it"
    )
    assert (list(alone.get_xdata()), list(alone.get_ydata())) == ([24], [14])
    assert drawn["K and age"].get_xlim()[1] > 39


def test_age_is_drawn_where_it_is_not_k() -> None:
    rows = [tick_row(tick, random.Random(0), 0, 0.0) for tick in range(20)]
    labels = [
        line.get_label() for line in panels(correction_plans(run_of(rows)), run_of(rows))["K and age"].get_lines()
    ]
    assert labels == ["K, also the age"]
    for row in rows[6:]:
        row["correction/age"] -= 4
    ages = {
        line.get_label(): line for line in panels(correction_plans(run_of(rows)), run_of(rows))["K and age"].get_lines()
    }
    assert list(ages) == ["K", "age"] and list(ages["age"].get_ydata())[:3] == [2, 3, 4]


def test_measures_that_a_merger_does_not_have_are_left_out() -> None:
    rows = [tick_row(tick, random.Random(0), 0, 0.0) for tick in range(20)]
    for row in rows:
        row |= {name: None for name in ("correction/c", "correction/lambda")}
    record = run_of(rows, merger="signed_ema")
    assert list(panels(correction_plans(record), record)) == ["K and age", "Dose", "Correction against own gradient"]
    section = correction_section(record, ledger_summary([]))
    assert cells(section, "corrections-made")[1][4:6] == ["–", "–"] and "λ –" not in words(section)


def test_a_run_without_corrections_has_no_such_section(tmp_path: Path) -> None:
    record = read_run(plausible_run(tmp_path, 20, merger="none"))
    summary = ledger_summary(record.ledger)
    assert not has_corrections(record, summary)
    assert correction_plans(record) == [] and correction_section(record, summary) == ""
    old = run_of([{"type": "tick", "tick": 0}])
    assert not has_corrections(old, ledger_summary([])) and refresh_plans(old) == [] and refresh_section(old) == ""


def test_corrections_that_never_came_or_were_refused_are_told() -> None:
    refused = {"type": "event", "tick": 3, "event": "correction_refused", "message": "version 2: not finite"}
    record = run_of([{"type": "tick", "tick": 0}], [refused, {"type": "event", "event": "correction"}], "held_delta")
    text = words(correction_section(record, ledger_summary([])))
    assert "No correction has come yet." in text and "Refused: 1 correction; the events say why." in text
    assert "Whether ticks waited for the anchor was not recorded." in text
    never = run_of([], [correction_event(3)])
    assert cells(correction_section(never, ledger_summary([])), "corrections-made")[1] == [
        "3", "20", "–", "never", "–", "–", "–", "–"
    ]  # fmt: skip


def test_waiting_is_summed_and_never_hidden() -> None:
    rows = [tick_row(tick, random.Random(0), 0, 0.0) | {"anchor/wait_s": 0.125} for tick in range(8)]
    assert "Ticks waited 1 s for the anchor." in words(correction_section(run_of(rows), ledger_summary([])))


def test_one_line_says_what_a_tick_merged() -> None:
    row = tick_row(18, random.Random(0), 0, 0.0)
    assert merge_text(row) == "version 2, K 8, age 8, c 0.66, lambda 0.5, share 8.99 %, cos +0.160"
    assert merge_text({"correction/version": 4, "correction/c": None, "correction/K": float("nan")}) == "version 4"
    assert merge_text({}) == merge_text({"correction/version": 0}) == merge_text({"correction/version": "x"}) == ""


def test_a_pinned_refresh_leaves_no_trace_and_an_unpinned_one_does(corrected: RunRecord, jumped: RunRecord) -> None:
    calm, spiked = refresh_section(corrected), refresh_section(jumped)
    assert "which is within noise." in words(calm) and "more than noise" not in words(calm)
    assert [row[0] for row in cells(calm, "refresh-clips")[1:]] == [
        *(f"batch after a refresh, pass {n}" for n in (1, 2, 3, 4)), "batch after a refresh, all passes"
    ]  # fmt: skip
    assert "which is more than noise." in words(spiked)
    assert re.search(
        r"At 7 refreshes inside a batch the clip fraction went from 0\.\d+ % .* to 2\d\.\d+ %", words(spiked)
    )
    rows = {row[0]: row[1:] for row in cells(spiked, "refresh-clips")}
    difference = float(rows["after a refresh inside the batch, all passes"][2].split()[0])
    rise = float(rows["rise from the one to the other"][2].split()[0])
    assert difference == pytest.approx(20.0, abs=0.3) and rise == pytest.approx(20.0, abs=0.3)


def test_refreshes_are_marked_where_they_took_effect(corrected: RunRecord, jumped: RunRecord) -> None:
    def marks(record: RunRecord) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {"-": [], ":": []}
        for line in panels(refresh_plans(record), record)["By tick"].get_lines()[1:]:
            found["-" if line.get_linestyle() == "-" else ":"].append(float(next(iter(line.get_xdata()))))
        return found

    assert marks(corrected) == {"-": [], ":": [24, 48, 64, 88, 104, 128, 144]}
    assert marks(jumped) == {"-": [21, 41, 61, 81, 101, 121, 141], ":": []}
    places = panels(refresh_plans(jumped), jumped)["By place in the batch"]
    assert places.get_legend_handles_labels()[1] == ["other batches", "after a refresh inside the batch"]


def test_a_long_run_is_drawn_by_batches(tmp_path: Path) -> None:
    rows = [tick_row(tick, random.Random(tick), tick // 40, 0.0) for tick in range(480)]
    drawn = panels(refresh_plans(run_of(rows)), run_of(rows))
    line = drawn["By tick, means of batches"].get_lines()[0]
    assert len(line.get_xdata()) == 60
    assert float(line.get_ydata()[1]) == pytest.approx(sum(row["clip_ratio/region_mean"] for row in rows[8:16]) / 8)
    assert panels(correction_plans(run_of(rows)), run_of(rows))["Dose"].has_data()


def test_the_page_has_both_sections_with_their_words(corrected: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anchor_node.plots.draw", lambda plan, record: Drawing(plan.key, plan.title, "", "", ""))
    page = write_report(corrected.folder).read_text(encoding="utf-8")
    sections = re.findall(r'<section id="(\w+)">', page)
    assert sections.index("refreshes") < sections.index("corrections") < sections.index("policy")
    assert page.count('id="refresh-clips"') == page.count('id="corrections-made"') == page.count("Ticks waited") == 1


def test_every_figure_of_the_policy_marks_the_refreshes(corrected: RunRecord) -> None:
    axes = [Figure().add_subplot() for _ in range(4)]
    assert _policy(axes, corrected)
    for ax in axes:
        dotted = [line for line in ax.get_lines() if len(set(line.get_xdata())) == 1]
        assert [float(next(iter(line.get_xdata()))) for line in dotted] == [24, 48, 64, 88, 104, 128, 144]
    empty = Figure().add_subplot()
    mark_refreshes(empty, [3, 4])
    assert not empty.has_data(), "a panel without data must still look empty"


@pytest.mark.parametrize("ticks", [0, 1])
def test_a_run_that_has_hardly_begun_renders(ticks: int, tmp_path: Path) -> None:
    folder = plausible_run(tmp_path, ticks)
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"type":"tick","tick":1,"correction/version":1,"basis/version":3,"batch":"x"}\n{"type":"eve')
    page = write_report(folder).read_text(encoding="utf-8")
    assert "Could not be drawn" not in page and '<section id="corrections">' in page
