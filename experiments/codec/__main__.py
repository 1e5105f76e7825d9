"""`python -m experiments.codec`: what compressed links cost a training run, cell by cell, against dense links.

run      train the cells that the results file does not have yet; Ctrl-C loses only what is under way
table    benchmarks/codec.md, codec.json and codec.png out of the results file
cells    the cells and their overrides
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from experiments import record
from experiments.codec import page, results
from experiments.codec.cells import CELLS, MODELS, ROOT
from experiments.codec.job import Job, run_job
from experiments.codec.workers import run_missing, seeds_of
from swarm_core.config import parse_overrides
from swarm_core.errors import UserError

RESULTS = ROOT / "runs" / "codec" / "results.jsonl"


def main() -> int:
    arguments = _parser().parse_args()
    try:
        return int(arguments.command(arguments))
    except UserError as error:
        print(f"codec: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("codec: stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    summary, _, commands = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m experiments.codec", description=f"{summary}\n\n{commands}", formatter_class=raw
    )
    sub = parser.add_subparsers(required=True, metavar="run | table | cells")

    run = sub.add_parser(
        "run", help="train cells", description="Train cells, several seeds each, and append to the results."
    )
    run.add_argument("--model", choices=sorted(MODELS), default="tiny", help="default: %(default)s")
    run.add_argument("--cells", nargs="+", metavar="NAME", help="default: all of the model; see `cells`")
    run.add_argument("--seeds", default="0-4", help="as 0-4 or 0,2,7 (default: %(default)s)")
    run.add_argument("--workers", type=int, default=1, help="runs side by side, one thread each (default: %(default)s)")
    run.add_argument("--set", action="append", default=[], metavar="SECTION.KNOB=VALUE", dest="extra",
                     help="on top of each chosen cell, which becomes another one: CELL+KNOB=VALUE")  # fmt: skip
    run.set_defaults(command=_run)

    table = sub.add_parser("table", help="write the page", description="Write codec.md, codec.json and codec.png.")
    table.add_argument(
        "--extras", action="store_true", help="cells that are not declared, too (`run --set`, old settings)"
    )
    table.add_argument("--print", action="store_true", dest="only_print", help="print the tables and write nothing")
    table.add_argument("--to", type=Path, default=record.BENCHMARKS, help="folder (default: benchmarks)")
    table.set_defaults(command=_table)

    cells = sub.add_parser("cells", help="list the cells", description="List the cells and their overrides.")
    cells.set_defaults(command=_cells)
    for each in (run, table):
        each.add_argument(
            "--results", type=Path, default=RESULTS, help="results file (default: runs/codec/results.jsonl)"
        )
    return parser


def _run(arguments: argparse.Namespace) -> int:
    names = arguments.cells or list(CELLS[arguments.model])
    if unknown := set(names) - set(CELLS[arguments.model]):
        raise UserError(
            f"no cells {sorted(unknown)} of {arguments.model}; known are {', '.join(CELLS[arguments.model])}"
        )
    extra = tuple(parse_overrides(arguments.extra).items())
    # Seed by seed, so that an unfinished table is one of fewer seeds.
    jobs = [Job(arguments.model, name, seed, extra) for seed in seeds_of(arguments.seeds) for name in names]
    for job in jobs[: len(names)]:
        job.config(), job.uncompressed()  # a wrong knob is refused before anything trains
    failed = run_missing(jobs, run_job, arguments.results, arguments.workers, _figures)
    return 1 if failed else 0


def _figures(row: dict[str, Any]) -> str:
    end, size = row["end"], row["bytes"]
    return (
        f"accuracy {end['weights']['expected']:.4f}, through links {end['links']['expected']:.4f}, "
        f"{size['share_of_dense']:.2%} of dense, {row['gated']} gated, {row['cpu_s']:.0f} s CPU, {row['wall_s']:.0f} s"
    )


def _table(arguments: argparse.Namespace) -> int:
    rows = results.read(arguments.results)
    if not rows:
        raise UserError(f"{arguments.results} holds no run: `python -m experiments.codec run` makes some")
    models = {model: results.table(rows, model, extras=arguments.extras) for model in MODELS}
    for model, cells in models.items():
        if cells:
            print(f"{model}\n{page.table(cells)}\n")
    if arguments.only_print:
        return 0
    facts = record.facts()
    workloads = {model: _workload(rows, model) for model in MODELS}
    plain = {model: [dataclasses.asdict(cell) for cell in cells] for model, cells in models.items() if cells}
    record.write("codec", page.page(models, workloads, facts), facts, {"cells": plain}, arguments.to)
    page.plot(models, arguments.to / "codec.png")
    return 0


def _workload(rows: list[results.Row], model: str) -> str:
    """What a model's cells have in common, in a line."""
    row = next((row for row in rows if row["model"] == model), None)
    if row is None:
        return ""
    job = Job(model, next(iter(CELLS[model])), 0)
    c, start = job.config(), row["start"]["weights"]["expected"]
    return (
        f"{row['problems']:,} held-out problems, accuracy {start:.3f} before training; {c.run.ticks} ticks, "
        f"{c.grpo.prompts_per_batch} prompts x {c.grpo.completions_per_prompt} completions in {c.grpo.ticks_per_pass} ticks a pass, "
        f"at most {c.grpo.max_reuse} passes; lr {c.optimizer.lr:g}, {c.optimizer.schedule}."
    )


def _cells(arguments: argparse.Namespace) -> int:
    for model, cells in CELLS.items():
        for name, overrides in cells.items():
            print(f"{model:6} {name:28} {' '.join(f'{k}={v}' for k, v in overrides.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
