"""The report: parsed as a browser would, it must show the exact numbers of a synthetic run, alone and offline."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from anchor_node.drawing import draw
from anchor_node.plots import _kind_color, plans
from anchor_node.record import KIND_ORDER, byte_text, read_run, share_text
from anchor_node.report import ledger_summary, main, print_ledger, write_report

HEAD = "tick,link,direction,kind,dense_bytes,packet_bytes,message_bytes,wire_bytes,frames\n"
FIGURES = ["reward", "bytes", "dgg", "basis", "refreshes", "policy", "signal", "time"]


def tick_row(tick: int) -> dict[str, Any]:
    gated = tick == 11
    return {
        "type": "tick", "tick": tick, "batch": tick // 4, "pass": 1 + tick % 4 // 2, "slice": tick % 2,
        "outcome": "skip" if gated else "commit", "skip_reason": "gate" if gated else None, "time_s": 2.0 * (tick + 1),
        "tick_s": 2.0, "reward": 0.1 + 0.02 * tick, "frac_reward_zero_std": 0.25, "completions/mean_length": 12.5,
        "completions/clipped_ratio": 0.0625, "loss": 0.001, "entropy": 1.5, "clip_ratio/region_mean": 0.02,
        "clip_ratio/low_mean": 0.01, "clip_ratio/high_mean": 0.01, "grad_norm": 0.5, "dgg/g": 3.0,
        "dgg/z": None if tick < 6 else (1.75 if gated else 0.1), "dgg/gated": int(gated),
        "sampling/sampling_logp_difference/mean": 0.0125, "tokens_per_s": 4321.0, "basis/version": tick // 8,
        "basis/share_forward/boundary_0": 0.97, "basis/share_backward/boundary_0": 0.81, "wait_s/stage_0": 0.5,
        "busy_s/stage_0": 1.5, "wait_s/stage_1": 1.0, "busy_s/stage_1": 1.0,
    }  # fmt: skip


def eval_row(tick: int, accuracy: float, squeezed: float) -> dict[str, Any]:
    return {"type": "eval", "tick": tick, "batch": tick // 4, "time_s": 2.0 * tick, "eval/accuracy": accuracy,
            "eval/accuracy_compressed": squeezed, "eval/mean_length": 12.0, "eval/prompts": 256,
            "eval/interval95": 0.06}  # fmt: skip


def ledger_lines(ticks: int) -> str:
    lines = [f"{tick},stage0-stage1,down,activation,1000,50,60,,2\n{tick},stage0-stage1,up,gradient,1000,100,110,,2\n"
             f"{tick},stage0-stage1,up,control,0,0,20,,1\n" for tick in range(ticks)]  # fmt: skip
    return "".join(lines) + "0,sampler-stage0,down,rollout,5000,2000,2100,,1\n"


def manifest(ticks: int = 16) -> dict[str, Any]:
    return {
        "config": {"run": {"name": "tiny", "ticks": ticks}, "model": {"path": "/models/arith"}, "swarm": {"stages": 2},
                   "dgg": {"enabled": True, "tau": 0.5}, "grpo": {"max_reuse": 4, "dual_clip": None},
                   "links": {"kind": "lowrank"}},
        "spans": [{"first_layer": 0, "last_layer": 2}, {"first_layer": 2, "last_layer": 5}], "digest": "0123456789abcdef" * 4,
        "ranks": {"forward": 24, "backward": 48},
        "shape": {"family": "qwen2", "layers": 5, "hidden": 480, "vocab": 32},
    }  # fmt: skip


def write_run(folder: Path, rows: Sequence[dict[str, Any]], *, torn: str = "") -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    (folder / "ledger.csv").write_text(HEAD + ledger_lines(16))
    (folder / "manifest.json").write_text(json.dumps(manifest()))
    return folder


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [eval_row(0, 0.25, 0.1875), *(tick_row(tick) for tick in range(16)), eval_row(15, 0.75, 0.6875)]
    rows.insert(9, {"type": "event", "tick": 8, "time_s": 16.5, "event": "basis", "message": "version 1 <adopted>"})
    folder = write_run(tmp_path_factory.mktemp("whole"), rows, torn='{"type":"tick","tick":16,"rew')
    write_report(folder)
    return folder


@dataclass
class Page(HTMLParser):
    """The parts of a page by id, as a browser's parser sees them, and everything that could reach outside."""

    source: str
    texts: dict[str, str] = field(default_factory=dict)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    unbalanced: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[tuple[str, str]] = []
        self.feed(self.source)
        self.close()
        self.unbalanced += [tag for tag, _ in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.ids += [named["id"] or ""] if "id" in named else []
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "data", "action"}]
        if tag not in {"meta", "br", "img", "link"}:
            self._open.append((tag, named.get("id") or ""))
        table = self._table()
        if table is not None and tag == "tr":
            table.append([])
        if table and tag in {"td", "th"}:
            table[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1][0] != tag:
            self.unbalanced.append(tag)
            return
        self._open.pop()

    def handle_data(self, data: str) -> None:
        data = data.replace("\u00a0", " ")
        for _, name in self._open:
            if name:
                self.texts[name] = self.texts.get(name, "") + data
        table = self._table()
        if table and table[-1] and any(tag in {"td", "th"} for tag, _ in self._open):
            table[-1][-1] += data

    def _table(self) -> list[list[str]] | None:
        name = next((name for tag, name in reversed(self._open) if tag == "table"), None)
        return None if name is None else self.tables.setdefault(name, [])


def read_page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_headline_has_the_exact_numbers(whole_run: Path) -> None:
    page = read_page(whole_run)
    tiles = {name: page.texts[f"{name}-tile"] for name in ("model", "stages", "links", "ticks", "validation", "wall")}
    assert tiles == {
        "model": "arithqwen2 · 5 layers · width 480 · vocabulary 32",
        "stages": "2 stageslayers 0–1 · 2–4",
        "links": "1 linkrank 24 forward, 48 backward, of 480",
        "ticks": "15 committed1 skipped (1 gate) · 4 rollout batches",
        "validation": "25.0 % ± 6.0 → 75.0 % ± 6.0through compressed links at the end: 68.8 %",
        "wall": "32.0 smedian 4,321 tokens/s",
    }
    # 16 x (60 + 110) of 16 x 2000 bytes; with packets 16 x 150.
    assert page.texts["share-tile"] == (
        "8.50 %activations and gradients as messages, 7.50 % as packets · 2.7 kB for 32.0 kB"
    )
    assert page.texts["bytes-tile"] == f"{byte_text(16 * 190 + 2100)}81 frames"
    assert page.texts["state"] == "finished, 16 of 16 ticks"
    assert "the two 95 % intervals do not overlap" in page.source.replace("\u00a0", " ")


def test_tables_have_the_exact_numbers(whole_run: Path) -> None:
    tables = read_page(whole_run).tables
    assert tables["evaluations"][1:] == [
        ["0", "25.0 % ± 6.0", "18.8 %", "12.0", "256"],
        ["15", "75.0 % ± 6.0", "68.8 %", "12.0", "256"],
    ]
    assert tables["ledger"][1:] == [
        ["stage0-stage1", "down", "activation", "16.0 kB", "800 B", "960 B", "6.00 %", "32"],
        ["stage0-stage1", "up", "gradient", "16.0 kB", "1.6 kB", "1.8 kB", "11.0 %", "32"],
        ["stage0-stage1", "up", "control", "–", "0 B", "320 B", "–", "16"],
        ["sampler-stage0", "down", "rollout", "5.0 kB", "2.0 kB", "2.1 kB", "42.0 %", "1"],
        ["all links", "", "activation + gradient", "32.0 kB", "2.4 kB", "2.7 kB", "8.50 %", "64"],
        ["everything", "", "", "37.0 kB", "4.4 kB", "5.1 kB", "13.9 %", "81"],
    ]
    vitals = {row[0]: row[1:3] for row in tables["vitals"][1:]}
    assert vitals["Reward"] == ["0.1", "0.4"]
    assert vitals["Cut at the length limit"] == ["6.2 %", "6.2 %"]
    assert vitals["Loss"] == ["0.001", "0.001"]
    knobs = {row[0]: row[1:] for row in tables["knobs"][1:]}
    assert knobs["grpo.max_reuse"][:2] == ["4", "passes"] and "single use" in knobs["grpo.max_reuse"][2]
    assert knobs["grpo.dual_clip"][0] == "none"
    assert tables["events"][1:] == [["16.5 s", "8", "basis", "version 1 <adopted>"]]


def test_every_figure_is_drawn_for_wide_and_narrow_screens(whole_run: Path) -> None:
    page = read_page(whole_run)
    assert page.tags.count("figure") == page.tags.count("figcaption") == len(FIGURES)
    assert page.tags.count("svg") == 2 * len(FIGURES)
    assert re.findall(r'<section id="(\w+)">', page.source) == FIGURES
    text = {name: page.texts[name] for name in FIGURES}
    for name, words in {
        "reward": ["validation, compressed links", "new basis in use", "tick skipped", "tick"],
        "bytes": ["activation", "gradient", "rollout", "control", "dense links", "bytes a tick", "6.00 %"],
        "dgg": ["threshold τ = 0.5", "gated", "first pass, not gated", "z (standard deviations)"],
        "basis": ["forward, rank 24", "backward, rank 48", "boundary 0", "captured share"],
        "refreshes": ["By tick", "new basis", "By place in the batch", "of tokens, clipped"],
        "policy": ["nats a token", "of tokens", "tokens", "of completions"],
        "signal": ["Loss (near 0 is normal)", "A GRPO loss near 0 is normal"],
        "time": ["seconds", "stage 0", "stage 1", "100 %", "of the stage’s time"],
    }.items():
        assert [word for word in words if word not in text[name]] == []


def test_the_page_stands_alone(whole_run: Path) -> None:
    page = read_page(whole_run)
    assert page.unbalanced == []
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "link", "iframe", "object", "image", "img"} & set(page.tags)
    assert [link for link in page.links if not link.startswith("#")] == []
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert {name for name in re.findall(r"url\(([^)]*)\)", page.source) if name[1:] not in page.ids} == set()
    without_namespaces = re.sub(r'xmlns(?::\w+)?="[^"]*"', "", page.source)
    assert re.findall(r"(?:https?:|file:|ftp:|@import|//\w)", without_namespaces) == []


def test_light_dark_and_narrow_have_their_styles(whole_run: Path) -> None:
    source = read_page(whole_run).source
    dark = re.search(r"@media \(prefers-color-scheme: dark\) \{\s*:root \{(.*?)\}", source, flags=re.DOTALL)
    light = re.search(r":root \{(.*?)\}", source, flags=re.DOTALL)
    assert dark and light
    used = set(re.findall(r"var\((--\w+)\)", source))
    assert {"--ink", "--muted", "--grid", "--blue", "--orange", "--green"} <= used
    for styles in (light.group(1), dark.group(1)):
        assert used <= set(re.findall(r"(--\w+):", styles))
    drawings = "".join(re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL))
    assert re.findall(r"#[0-9a-fA-F]{6}\b", drawings) == []  # every colour follows the theme
    assert "font-family" not in drawings and "DejaVu" not in drawings


def test_torn_lines_are_said_and_change_no_number(whole_run: Path, tmp_path: Path) -> None:
    assert "1 line(s) of metrics.jsonl could not be read" in read_page(whole_run).source.replace("\u00a0", " ")
    folder = write_run(tmp_path, [tick_row(0)])
    with (folder / "ledger.csv").open("a") as ledger:
        ledger.write("1,stage0-stage1,down,activation,10000,50,60,,2")  # no newline: the last number may be cut
    record = read_run(folder)
    assert ledger_summary(folder).bad_rows == 1 and ledger_summary(record.ledger).link.dense == 32000
    assert any("1 row(s) of ledger.csv" in problem for problem in record.problems)


@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger.csv", "manifest.json"])
def test_a_missing_file_leaves_the_rest(name: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path, [tick_row(0), tick_row(1)])
    (folder / name).unlink()
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert page.unbalanced == [] and "Could not be drawn" not in page.source
    assert (page.texts["ticks-tile"].startswith("2 committed")) == (name != "metrics.jsonl")
    assert (page.texts["share-tile"].startswith("8.50 %")) == (name != "ledger.csv")
    assert (page.texts["model-tile"].startswith("arith")) == (name != "manifest.json")


def test_an_unfinished_run_with_strange_rows(tmp_path: Path) -> None:
    strange: list[dict[str, Any]] = [
        {"type": "tick", "tick": 0}, {"type": "tick"}, {"type": "tick", "tick": "x", "reward": 1},
        {"type": "tick", "tick": 1, "reward": None, "dgg/z": "wide", "entropy": True, "tick_s": 0, "wait_s/stage_0": 1},
        {"type": "eval", "tick": 1}, {"type": "event"}, {"type": "news", "tick": 2},
    ]  # fmt: skip
    folder = write_run(tmp_path, strange, torn='[1]\nnull\n{"type":"tick","tick":2,"reward":NaN}\n')
    (folder / "manifest.json").write_text(
        '{"config": {"run": 3, "dgg": {"tau": "x"}}, "spans": [1], "ranks": 4, "shape": []}'
    )
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert page.texts["state"] == "unfinished: 3 ticks so far"
    assert "Could not be drawn" not in page.source and page.unbalanced == []
    assert "Nothing recorded for this figure yet." in page.texts["dgg"]


@pytest.fixture(scope="module")
def odd_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Of one tick only, with names that a page must escape."""
    folder = write_run(tmp_path_factory.mktemp("odd"), [tick_row(7)])
    told = manifest()
    told["config"]["run"]["name"] = "<script>alert(1)</script>&"
    (folder / "manifest.json").write_text(json.dumps(told))
    with (folder / "ledger.csv").open("a") as ledger:
        ledger.write('3,<b>$x_1$,down,"k<i>",10,5,6,,1\n')
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_one_tick_only(odd_page: Page) -> None:
    page = odd_page
    assert page.texts["state"] == "unfinished: 1 of 16 ticks so far"
    assert "Could not be drawn" not in page.source and page.tags.count("svg") == 2 * (len(FIGURES) - 1), "no refresh"


def test_a_long_run_stays_small_and_drawn(tmp_path: Path) -> None:
    rows = [tick_row(tick) | {"dgg/gated": int(tick % 9 == 0), "dgg/z": 0.6} for tick in range(3000)]
    rows += [eval_row(tick, 0.5, 0.4) for tick in range(0, 3000, 20)]
    target = write_report(write_run(tmp_path, rows))
    assert target.stat().st_size < 3_000_000
    page = Page(target.read_text(encoding="utf-8"))
    assert "Could not be drawn" not in page.source
    assert "1 tick in 3 is drawn" in page.texts["dgg"]


def test_names_are_escaped(odd_page: Page) -> None:
    page = odd_page
    assert not {"script", "b>", "i"} & set(page.tags) and page.unbalanced == []
    assert ["<b>$x_1$", "down", "k<i>", "10 B", "5 B", "6 B", "60.0 %", "1"] in page.tables["ledger"]


def test_a_tick_that_was_written_twice_counts_once(tmp_path: Path) -> None:
    rows = [tick_row(2), tick_row(0), tick_row(1), tick_row(2) | {"time_s": 5.9, "reward": 0.9}]
    record = read_run(write_run(tmp_path, rows))
    assert [(row["tick"], row["reward"]) for row in record.ticks] == [(0, 0.1), (1, pytest.approx(0.12)), (2, 0.9)]
    assert record.wall_s == 6.0
    assert any("1 tick(s) were written more than once" in problem for problem in record.problems)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that are about words alone: drawing takes seconds."""
    monkeypatch.setattr("anchor_node.report.draw_all", lambda record: [])


@pytest.mark.usefixtures("undrawn")
def test_a_stop_event_says_why(tmp_path: Path) -> None:
    stop = {"type": "event", "tick": 1, "time_s": 4.0, "event": "stop", "message": "SIGINT"}
    page = Page(write_report(write_run(tmp_path, [stop, tick_row(0)])).read_text(encoding="utf-8"))
    assert page.texts["state"] == "stopped after 1 of 16 ticks: SIGINT"
    again = {"type": "event", "tick": 1, "time_s": 4.5, "event": "start", "message": ""}
    page = Page(write_report(write_run(tmp_path, [stop, tick_row(0), again, tick_row(1)])).read_text(encoding="utf-8"))
    assert page.texts["state"] == "unfinished: 2 of 16 ticks so far"


def test_ledger_sums_from_folder_and_from_rows_agree(whole_run: Path) -> None:
    summary = ledger_summary(whole_run)
    assert summary == ledger_summary(read_run(whole_run).ledger)
    assert list(summary.by_kind) == ["activation", "gradient", "rollout", "control"]
    assert (summary.link.dense, summary.link.packet, summary.link.message) == (32000, 2400, 2720)
    assert summary.link.message_share == 0.085 and summary.link.packet_share == 0.075
    assert summary.by_flow["stage0-stage1", "up", "control"].message_share is None
    assert (summary.total.frames, summary.ticks, summary.total.wire) == (81, 16, None)


def test_wire_is_a_number_only_when_all_of_it_was_measured() -> None:
    row = dict(zip(HEAD.strip().split(","), (0, "a-b", "down", "activation", 10, 5, 6, 9, 1), strict=True))
    assert ledger_summary([row, row]).total.wire == 18
    assert ledger_summary([row, row | {"wire_bytes": ""}, row]).total.wire is None
    assert ledger_summary([row, {"tick": 1}, row | {"dense_bytes": "x"}]).bad_rows == 2
    assert ledger_summary([]).link.message_share is None


def test_the_closing_table() -> None:
    out = io.StringIO()
    rows = [dict(zip(HEAD.strip().split(","), line.split(","), strict=True)) for line in ledger_lines(16).splitlines()]
    print_ledger(Console(file=out, width=100), ledger_summary(rows))
    lines = [re.split(r"\s{2,}", line.strip()) for line in out.getvalue().splitlines()]
    assert ["gradient", "16.0 kB", "1.6 kB", "1.8 kB", "11.0 %", "32"] in lines
    assert ["activation + gradient", "32.0 kB", "2.4 kB", "2.7 kB", "8.50 %", "64"] in lines
    assert "The links carried 8.50 % of dense (7.50 % as packets), 170 B a tick over 16 ticks." in out.getvalue()


def test_a_score_pass_alone_is_no_tick() -> None:
    rows = [dict(zip(HEAD.strip().split(","), line.split(","), strict=True)) for line in ledger_lines(16).splitlines()]
    scored = rows[0] | {"tick": "16", "kind": "activation"}
    assert ledger_summary([*rows, scored]).ticks == ledger_summary(rows).ticks == 16


def test_what_cannot_be_negative_has_no_axis_below_zero(tmp_path: Path) -> None:
    rows = [tick_row(tick) | {"completions/clipped_ratio": 0.0} for tick in range(16)]
    record = read_run(write_run(tmp_path, rows))
    drawn = draw(next(plan for plan in plans(record) if plan.key == "policy"), record)
    for svg in (drawn.wide, drawn.narrow):
        words = [word.strip() for word in re.findall(r"<text[^>]*>([^<]*)<", svg)]
        assert "0 %" in words and [word for word in words if re.match("[-\u2212]\\d", word)] == []


def test_each_kind_of_a_run_has_a_colour_of_its_own() -> None:
    assert len({_kind_color(kind, KIND_ORDER) for kind in KIND_ORDER}) == len(KIND_ORDER)


def test_numbers_as_text() -> None:
    assert [byte_text(count) for count in (0, 999, 1500, 2.5e6, 3.21e9, 4e12)] == [
        "0 B", "999 B", "1.5 kB", "2.5 MB", "3.21 GB", "4.00 TB"
    ]  # fmt: skip
    assert [share_text(share) for share in (None, 0.0, 0.00001, 0.0512, 0.5, 1.25)] == [
        "–", "0.00 %", "0.001 %", "5.12 %", "50.0 %", "125.0 %"
    ]  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path, [tick_row(0)])
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert sorted(path.name for path in folder.iterdir()) == [
        "ledger.csv",
        "manifest.json",
        "metrics.jsonl",
        "report.html",
    ]
    assert main([str(folder / "nowhere")]) == 1 and "does not exist" in capsys.readouterr().err
    assert main([]) == 2 and "usage" in capsys.readouterr().err


def test_matplotlib_is_loaded_only_to_draw() -> None:
    code = (
        "import sys, anchor_node.report, anchor_node.live; print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_without_matplotlib_the_numbers_are_still_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(write_report(write_run(tmp_path, [tick_row(0)])).read_text(encoding="utf-8"))
    assert "Install matplotlib" in page.texts["reward"] and "svg" not in page.tags
    assert page.texts["share-tile"].startswith("8.50 %")
