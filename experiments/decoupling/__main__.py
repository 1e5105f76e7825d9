"""`python -m experiments.decoupling`: what stale corrections do to training, and which of their clocks does it.

run      train the cells that the results file does not have yet; Ctrl-C loses only what is under way
table    print the tables; with --record write decoupling.md, .json and the plots to benchmarks/
cells    the cells and their overrides
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from experiments import record
from experiments.codec import results
from experiments.codec.workers import run_missing, seeds_of
from experiments.decoupling import figures, page, plots
from experiments.decoupling.cells import CELLS, GRID, PINNING, ROOT, SIZES, WORKLOAD
from experiments.decoupling.job import SIZE_CELL, Job, run_job
from swarm_core.config import parse_overrides
from swarm_core.errors import UserError

RESULTS = ROOT / "runs" / "decoupling" / "results.jsonl"


def main() -> int:
    arguments = _parser().parse_args()
    try:
        return int(arguments.command(arguments))
    except UserError as error:
        print(f"decoupling: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("decoupling: stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    summary, _, commands = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    name = "python -m experiments.decoupling"
    parser = argparse.ArgumentParser(name, description=f"{summary}\n\n{commands}", formatter_class=raw)
    sub = parser.add_subparsers(required=True, metavar="run | table | cells")

    run = sub.add_parser(
        "run", help="train cells", description="Train cells, several seeds each; append to the results."
    )
    run.add_argument(
        "--cells", nargs="+", metavar="NAME", help="default: all of both parts, and the bytes; see `cells`"
    )
    run.add_argument("--seeds", default="0-4", help="as 0-4 or 0,2,7 (default: %(default)s)")
    run.add_argument("--workers", type=int, default=1, help="runs side by side, one thread each (default: %(default)s)")
    run.add_argument("--set", action="append", default=[], metavar="SECTION.KNOB=VALUE", dest="extra",
                     help="on top of each chosen cell, which becomes another one: CELL+KNOB=VALUE")  # fmt: skip
    run.set_defaults(command=_run)

    table = sub.add_parser("table", help="print or write the page", description="Print the tables, or write the page.")
    table.add_argument("--record", action="store_true", help="write the page, its numbers and its plots")
    table.add_argument("--to", type=Path, default=record.BENCHMARKS, help="folder for --record (default: benchmarks)")
    table.set_defaults(command=_table)

    sub.add_parser("cells", help="list the cells").set_defaults(command=_cells)
    for each in (run, table):
        each.add_argument("--results", type=Path, default=RESULTS, help="default: runs/decoupling/results.jsonl")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    known = [*CELLS, SIZE_CELL]
    names = arguments.cells or known
    if unknown := set(names) - set(known):
        raise UserError(f"no cells {sorted(unknown)}; known are: {'; '.join(known)}")
    extra = tuple(parse_overrides(arguments.extra).items())
    # Seed by seed, so that an unfinished table is one of fewer seeds.
    jobs = [Job(name, seed, extra) for seed in seeds_of(arguments.seeds) for name in names if name != SIZE_CELL]
    for job in jobs[: len(names)]:
        job.config(), job.uncompressed()  # a wrong knob is refused before anything trains
    if SIZE_CELL in names:
        models = [name for name, (run_file, *_) in SIZES.items() if _is_built(name, run_file)]
        jobs += [Job(SIZE_CELL, 0, extra, model) for model in models]
    return 1 if run_missing(jobs, run_job, arguments.results, arguments.workers, _figures) else 0


def _is_built(name: str, run_file: Path) -> bool:
    """The wide model is made by a command of its own; without it the table has one model less."""
    built = name != "wide" or (ROOT / "runs" / "wide" / "model").exists()
    if not built:
        print(
            f"{run_file}: the model is not built, its bytes are left out: `make wide-model` makes it", file=sys.stderr
        )
    return built


def _figures(row: results.Row) -> str:
    if row["cell"].partition("+")[0] == SIZE_CELL:
        what = f"{row['fast_per_tick']:,.0f} bytes a tick on the fast path"
    else:
        ends = figures.final(row), figures.lowest(row), figures.dose(row)
        what = "accuracy {:.4f}, lowest {:.4f}, dose {:.4f}".format(*ends)
    return f"{what}, {row['cpu_s']:.0f} s CPU, {row['wall_s']:.0f} s"


def _table(arguments: argparse.Namespace) -> int:
    rows = results.read(arguments.results)
    if not rows:
        raise UserError(f"{arguments.results} holds no run: `python -m experiments.decoupling run` makes some")
    runs = _declared(rows)
    cells = [figures.cell(name, runs) for name in GRID if name in runs]
    effects = figures.effects(runs)
    pinned = [figures.pinning(name, runs[name]) for name in PINNING if name in runs]
    sizes = {row["model"]: row for row in rows if row["settings"] == Job(SIZE_CELL, 0, (), row["model"]).settings}
    for part in (
        page.cells_table(cells),
        page.effects_table(effects),
        page.behaviour_table(cells),
        page.pinning_table(pinned),
    ):
        print(f"{part}\n")
    for name, found in sizes.items():
        print(f"{name}\n{page.sizes_table(found)}\n")
    if not arguments.record:
        return 0
    facts = record.facts()
    numbers = {
        "cells": [dataclasses.asdict(cell) for cell in cells],
        "effects": [{"change": name, "final": end, "mean": over} for name, end, over in _plain(effects)],
        "pinning": [dataclasses.asdict(each) for each in pinned],
        "bytes": {
            name: {k: found[k] for k in ("fast_per_tick", "bytes", "cosines", "slice")} for name, found in sizes.items()
        },
        "accuracy_by_tick": {name: figures.accuracy_curve(runs[name]) for name in runs},
    }
    record.write(
        "decoupling", page.page(cells, effects, pinned, sizes, _workload(rows), facts), facts, numbers, arguments.to
    )
    plots.by_tick(runs, arguments.to / "decoupling.png")
    plots.clip_fractions(runs, arguments.to / "pinning.png")
    return 0


def _plain(effects: list[tuple[str, Any, Any]]) -> list[tuple[str, dict[str, float], dict[str, float]]]:
    return [(name, dataclasses.asdict(end), dataclasses.asdict(over)) for name, end, over in effects]


def _declared(rows: list[results.Row]) -> dict[str, list[results.Row]]:
    """The runs of each cell as it is declared now, by seed; what was run with other settings does not count."""
    wanted = {name: Job(name, 0).settings for name in CELLS}
    runs: dict[str, list[results.Row]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["settings"] == wanted.get(row["cell"]):
            runs.setdefault(row["cell"], []).append(row)
    return {name: runs[name] for name in CELLS if name in runs}


def _workload(rows: list[results.Row]) -> str:
    """What the cells have in common, in a line."""
    config = Job(next(iter(GRID)), 0).config()
    g, problems = config.grpo, next((row["problems"] for row in rows if "problems" in row), 0)
    ranks = f"rank {WORKLOAD['links.rank_forward']} down and {WORKLOAD['links.rank_backward']} up of 96"
    return (
        f"examples/tiny: {problems} validation problems; {config.run.ticks} ticks, {g.prompts_per_batch} prompts x "
        f"{g.completions_per_prompt} completions in {g.ticks_per_pass} ticks, {g.max_reuse} pass; lr "
        f"{config.optimizer.lr:g}, constant; three stages, links of {ranks}. One thread a run: the swarm's own lead, "
        "stages, packets, sampler, calibrator and replay, in a fixed order."
    )


def _cells(arguments: argparse.Namespace) -> int:
    for name, cell in CELLS.items():
        more = [f"basis_lag={cell.basis_lag}"] * bool(cell.basis_lag) + [f"cold_prompts={cell.cold_prompts}"] * bool(
            cell.cold_prompts
        )
        print(f"{name:38} {' '.join([*(f'{k}={v}' for k, v in cell.overrides.items()), *more])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
