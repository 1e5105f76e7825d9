"""`make bench-anchor`: tokens/s with corrections on and off, the swarms taking turns on the same two cores.

Three swarms are up for the whole bench, alike but for their corrections, and train on the same rollouts. In each round
every one has a turn; the one that begins changes. Whoever is not at turn waits without using CPU, its anchor included.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from anchor_node.correction_sums import totals, version_uses
from anchor_node.record import read_run
from experiments import record
from experiments.bench.figures import SETTLING
from experiments.bench.workload import TINY, Workload
from experiments.bench_anchor.figures import COLUMNS, against, cells, level, snapshot_ticks
from experiments.bench_anchor.sides import CADENCE, OFF, OFTEN, SETTLE, SIDES, AnchorSide, AnchorTurn, start
from experiments.children import BenchError


def measure(workload: Workload, folder: Path, rounds: int) -> dict[str, Any]:
    """Run a workload with every side; what the page says of each."""
    sides: list[AnchorSide] = []
    turns: dict[str, list[AnchorTurn]] = {name: [] for name in SIDES}
    try:
        for name in SIDES:
            sides.append(start(workload, folder, name))
        for side in sides:
            side.anchor_turn(SETTLE)  # allocates the optimizer's state, and brings the first correction
        for number in range(rounds):
            first = number % len(sides)
            order = [*sides[first:], *sides[:first]]
            for side in order if number % 2 == 0 else reversed(order):
                turns[side.name].append(side.anchor_turn(CADENCE))
            speeds = {name: level(done[-1:], workload.tokens)["tokens_per_s"] for name, done in turns.items()}
            words = ", ".join(f"{name} {speed:,.0f} tok/s" for name, speed in speeds.items())
            print(f"round {number + 1} of {rounds}: {words}", flush=True)
    finally:  # what is wanted of the runs is in their books already
        for side in sides:
            side.kill()
    return {side.name: summary(side.out, turns[side.name], turns[OFF], workload.tokens) for side in sides}


def summary(out: Path, turns: list[AnchorTurn], off: list[AnchorTurn], tokens: int) -> dict[str, Any]:
    """One side: by itself, its run's own books, and, where corrections are on, against `off`."""
    run = read_run(out)
    sums, rows = totals(run, version_uses(run)), run.ticks
    merger, cadence = run.knob("corrections", "merger"), run.knob("anchor", "m_cadence")
    found: dict[str, Any] = {
        "level": level(turns, tokens),
        "run": {
            "ticks": len(rows),
            "skipped_ticks": sum(row["outcome"] == "skip" for row in rows),
            "merger": merger,
            "m_cadence": cadence,
            "made": sums.made,
            "merged_ticks": sums.merges,
            "mean_k": sums.mean_k,
            "replay_median_s": sums.replay_median_s,
            "refused": sums.refused,
            "rows_with_wait": sum("anchor/wait_s" in row for row in rows),
            "wait_s": sums.wait_s,
        },
    }
    return found if merger == "none" else {**found, "against": against(turns, off, snapshot_ticks(rows, cadence))}


def waited(results: dict[str, dict[str, Any]]) -> tuple[int, int, float]:
    """With corrections on: (tick rows that say how long they waited for the anchor, all tick rows, seconds waited)."""
    runs = [side["run"] for side in results.values() if side["run"]["merger"] != "none"]
    return sum(r["rows_with_wait"] for r in runs), sum(r["ticks"] for r in runs), sum(r["wait_s"] or 0.0 for r in runs)


def report(results: dict[str, dict[str, Any]], rounds: int, facts: dict[str, Any]) -> str:
    """The page that benchmarks/ keeps."""
    table = record.table(COLUMNS, [cells(name, side) for name, side in results.items()])
    told, ticks, wait_s = waited(results)
    return f"""\
# Corrections on and off: what the slow anchor costs the ticks

Written by `make bench-anchor ARGS=--record`; the numbers behind it are in `anchor.json`. {facts["date"]}.

{facts["cpu"]}, {facts["cores"]} cores, {facts["memory_gib"]} GiB, Linux {facts["kernel"]}, Python {facts["python"]},
torch {facts["torch"]}. Load average while the bench began and ended: {facts["load"][0]:.1f} and {facts["load"][1]:.1f}.

{table}

**The ratio has the anchor's replays in it: here they run on the stages' own two cores, in a swarm on a machine of their
own. What the stages themselves pay is the column *stages' CPU*.**

- Sides: `corrections.merger` = none; `held_delta` with every other knob of [corrections] and [anchor] at its default
  (m_cadence {CADENCE}); the same with m_cadence {OFTEN}. Each is an anchor, two stages with a core each, and a sampler
  that replays. Links as in examples/tiny (lowrank, 0.5 and 0.33 of the width), one tick a batch, fp32.
- The model and the tick of `make demo`: {TINY.microbatches} microbatches, {TINY.tokens:,} tokens. A tick's own work
  grows with its tokens, what a correction costs the stages does not; a larger model is trained on more of them a tick.
- {rounds} rounds, in each a turn of every side, of {CADENCE} ticks, {SETTLING} of them not counted. A turn holds one
  snapshot, or {CADENCE // OFTEN}, all in counted ticks, and is over when its anchor is idle.
- *ratio*: tokens/s over those of `off` in the same round, median; *quartiles* and *range* of the same. *median ticks*:
  the same of each turn's median tick, beside which no replay runs where m_cadence is {CADENCE}.
- *stages' CPU*: CPU seconds a tick of both stages' processes, all threads (merging, copying and packing snapshots,
  checking corrections), over those of `off`. *busy*: the same of the time in which the compute threads were at work;
  that is wall time, and a replay that takes their core away is in it.
- *after a snapshot*: by how much the tick that has the copying of the weights in it is longer than a turn's other
  ticks, less the same difference of `off`; its length, and the busy time of a stage. The replay begins in that tick.
- `anchor/wait_s`, the time that a tick waited for the anchor, is in {told} of {ticks} tick rows with corrections on;
  its sum is {wait_s:g} s.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-anchor", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=6, help="rounds: turns of every side (default %(default)s)")
    parser.add_argument("--record", action="store_true", help="write benchmarks/anchor.md and .json")
    parser.add_argument("--keep", type=Path, help="a new folder for logs and runs (default: a temporary one)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the clauses that end the children
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="kedge-bench-") as temporary:
        try:
            results = measure(TINY, arguments.keep or Path(temporary), arguments.pairs)
        except BenchError as error:
            print(f"bench-anchor: {error}", file=sys.stderr)
            return 1
    facts = record.facts(load)
    page = report(results, arguments.pairs, facts)
    print(page)
    if arguments.record:
        record.write("anchor", page, facts, {"sides": results})
    if (wait_s := waited(results)[2]) != 0:
        print(f"bench-anchor: ticks waited {wait_s:g} s for the anchor; wanted exactly 0", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
