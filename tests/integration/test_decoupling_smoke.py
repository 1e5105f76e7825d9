"""The decoupling experiment: corrections are merged at the age they are declared with, and tables say how sure they are."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from experiments import record
from experiments.codec import results
from experiments.codec.figures import interval
from experiments.decoupling import __main__ as program
from experiments.decoupling import cells, figures, job, page, sizes
from experiments.decoupling.cells import Cell, corrected
from experiments.decoupling.job import Job, run_job

TICKS = 12
SMALL = {
    "run.ticks": str(TICKS), "grpo.prompts_per_batch": "6", "anchor.calibration_prompts": "4", "optimizer.lr": "3e-4",
    "grpo.max_completion_length": "6", "sampler.eval_prompts": "16",
}  # fmt: skip
NONE = "none, cadence 2"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setitem(cells.WORKLOAD, name, value)
    monkeypatch.setattr(job, "EVAL_EVERY", 4)


def put(monkeypatch: pytest.MonkeyPatch, where: dict[str, Cell], **named: Cell) -> None:
    """Exactly these cells in `where` (GRID or PINNING), and in CELLS."""
    for name in list(where):
        monkeypatch.delitem(where, name)
    for name, cell in named.items():
        monkeypatch.setitem(where, name, cell)
        monkeypatch.setitem(cells.CELLS, name, cell)


def run(name: str, seed: int, folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(json.dumps(run_job(Job(name, seed), folder)))
    return row


@pytest.mark.parametrize("merger", ["held_delta", "signed_ema"])
def test_a_correction_is_merged_from_s_plus_k_until_the_next_one_is(
    merger: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put(monkeypatch, cells.GRID, late=corrected(merger, 5, 3, 2))
    row = run("late", 0, tmp_path)
    assert set(row["outcomes"]) == {"commit"}  # a skipped tick would put its snapshot off
    # Snapshots at s = -5 mod 3 = 1, 4, 7: due at 6, 9 and 12.
    series = row["series"]
    assert series["K"] == [None] * 6 + [5, 6, 7, 5, 6, 7] == series["age"]
    assert series["version"] == [None] * 6 + [1, 1, 1, 2, 2, 2]
    assert all((share or 0) > 0 for share in series["share"][6:])
    assert len(row["form_cosines"]) == 4 and all(0.1 < cosine <= 1 for cosine in row["form_cosines"])
    assert [e["tick"] for e in row["evaluations"]] == [0, 4, 8, 12]


def test_two_seeds_make_a_page_with_intervals(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lossless = Cell({"links.kind": "none"})
    stale = dataclasses.replace(corrected("signed_ema", 2, 2), like=NONE)
    put(monkeypatch, cells.GRID, **{"dense": lossless, NONE: cells.uncorrected(2), "stale": stale})
    pinning = {"anchor.q_cadence": "4", "links.reuse_deltas": "false"}
    unpinned = Cell({**pinning, **cells.UNPINNED}, basis_lag=1, cold_prompts=2)
    put(monkeypatch, cells.PINNING, **{"jump, pinned": Cell(pinning, basis_lag=1), "jump, unpinned": unpinned})
    monkeypatch.setattr(record, "facts", lambda: dict.fromkeys(record_facts(), "-"))
    file = tmp_path / "results.jsonl"
    for name, seed in [
        *((name, seed) for name in cells.GRID for seed in (0, 1)),
        *((name, 0) for name in cells.PINNING),
    ]:
        results.append(file, run(name, seed, tmp_path / "runs"))
    with file.open("a") as opened:
        opened.write('{"model": "tiny", "ce')  # a process killed while it wrote

    rows = {(row["cell"], row["seed"]): row for row in results.read(file)}
    monkeypatch.setattr("sys.argv", ["-", "table", "--record", "--results", str(file), "--to", str(tmp_path)])
    assert program.main() == 0
    written, told = (tmp_path / "decoupling.md").read_text(), json.loads((tmp_path / "decoupling.json").read_text())
    assert page.cells_table([figures.cell("stale", {"stale": [rows["stale", 0]]})]).splitlines()[-1].count("±") == 0
    less_none = interval([figures.final(rows["stale", s]) - figures.final(rows[NONE, s]) for s in (0, 1)])
    assert f"{less_none.mean:+.4f} ± {less_none.half:.4f}" in written and "± " in capsys.readouterr().out
    (stale_cell,) = (c for c in told["cells"] if c["name"] == "stale")
    assert stale_cell["less_none"] == dataclasses.asdict(less_none) and stale_cell["dose"]["mean"] > 0
    for plot in ("decoupling.png", "pinning.png"):
        assert (tmp_path / plot).stat().st_size > 0

    # A basis arrives after ticks 4 and 8, the first ones of their batches (0 1, 2 3, 4 5, ...).
    assert rows["jump, unpinned", 0]["series"]["basis"] == [0] * 5 + [1] * 4 + [2] * 3
    assert rows["jump, pinned", 0]["series"]["basis"] == [0] * 6 + [1] * 4 + [2] * 2
    assert all(share < 0.95 for _, share in rows["jump, unpinned", 0]["overlaps"])


def record_facts() -> tuple[str, ...]:
    return "date", "cpu", "cores", "memory_gib", "kernel", "python", "torch"


def test_bytes_of_every_form_are_weighed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run_file, _, own = cells.SIZES["tiny"]
    monkeypatch.setitem(cells.SIZES, "tiny", (run_file, 4, {**own, **SMALL, "run.ticks": "4"}))
    monkeypatch.setattr(sizes, "APART", 1)
    monkeypatch.setattr(sizes, "SPANS", (1,))
    monkeypatch.setitem(sizes.SNAPSHOTS, "anchor.m_cadence", "1")
    found = run(job.SIZE_CELL, 0, tmp_path)
    size, kept = found["bytes"], found["cosines"]
    assert found["snapshots"] == 4 and found["fast_per_tick"] > 0 and found["slice"] > 0
    assert size["snapshot bf16 1"] < size["snapshot tf32 1"] < size["snapshot exact 1"]
    assert size["M sign"] <= found["parameters"] / 8 * 1.1 and size["M bf16"] > 1.8 * found["parameters"] / 2
    assert kept["M bf16"] > 0.999 > kept["delta lowrank"] > kept["delta topk"] > 0.2
    found["bytes"] |= {
        f"snapshot {kind} {span}": size["snapshot tf32 1"] for kind in sizes.ROUNDED for span in (20, 60)
    }
    assert page.sizes_table(found).count("correction") == 7


def series(basis: list[int], clip: list[float | None]) -> dict[str, Any]:
    batch = [tick // 2 for tick in range(len(basis))]
    return {"series": {"basis": basis, "clip": clip, "batch": batch}, "overlaps": [[1, 0.5]],
            "evaluations": [{"tick": 0, "expected": 0.5}]}  # fmt: skip


def test_a_batch_that_meets_a_new_basis_is_told_from_the_others() -> None:
    clip: list[float | None] = [0, 0.1, 0, 0.2, 0, 0.3, 0, None]
    pinned = figures.pinning("x", [series([0, 0, 1, 1, 1, 1, 1, 1], clip)])
    assert (pinned.after.mean, pinned.others.mean) == (0.2, 0.2) and pinned.refreshes == 1
    unpinned = figures.pinning("x", [series([0, 0, 0, 0, 0, 1, 1, 1], clip)])
    assert (unpinned.after.mean, unpinned.largest) == (0.3, 0.3)
    assert unpinned.others.mean == pytest.approx(0.15) and math.isinf(unpinned.difference.half)
