"""`make bench`: tokens/s of a two-stage swarm against torch.distributed.pipelining, taking turns on the same two cores.

Both sides are up for the whole bench. They alternate every few ticks (which of the two begins a pair alternates as
well), each stage has a core of its own, and whoever is not at turn waits without using CPU. So whatever else the
machine does hits both alike, and the ratio of neighbouring turns is worth more than either side's tokens/s.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments import record
from experiments.bench.figures import SETTLING, Pair, cells, markdown_table, summary
from experiments.bench.sides import TorchSide, Turn
from experiments.bench.swarm_side import SwarmSide
from experiments.bench.workload import STAGES, WORKLOADS, Workload, build
from experiments.children import BenchError


def measure(workload: Workload, folder: Path, pairs: int) -> dict[str, Any]:
    """Run one workload on both sides; the summary."""
    setup = build(workload, folder)
    cores = sorted(os.sched_getaffinity(0))[:STAGES]
    if len(cores) < STAGES:
        raise BenchError(f"{STAGES} stages want {STAGES} cores; this process may use {len(cores)}")
    running: list[SwarmSide | TorchSide] = []
    done: list[Pair] = []
    try:
        swarm = SwarmSide(setup, folder, cores)
        running.append(swarm)
        rival = TorchSide(setup, folder, cores)
        running.append(rival)
        for side in running:
            side.turn(SETTLING)  # the first ticks allocate the optimizer's state
        for number in range(pairs):
            turns: dict[str, Turn] = {}
            for side in running if number % 2 == 0 else reversed(running):
                turns[side.name] = side.turn(SETTLING + workload.turn)
            done.append(Pair(turns["swarm"], turns["torch"]))
            so_far = summary(done, workload.tokens, workload.microbatches)
            print(f"{workload.name}: pair {number + 1} of {pairs}, ratio so far {so_far['ratio']:.3f}", flush=True)
        for side in running:
            side.close()
    finally:
        for side in running:
            side.kill()
    return summary(done, workload.tokens, workload.microbatches)


def report(results: dict[str, dict[str, Any]], facts: dict[str, Any]) -> str:
    """The page that benchmarks/ keeps."""
    table = markdown_table([cells(name, found) for name, found in results.items()])
    shapes = [
        f"- `{name}`: {found['microbatches']} microbatches, {found['tokens_a_tick']:,} tokens a tick; "
        f"{found['pairs']} pairs of turns of {found['ticks_a_turn']} ticks after {SETTLING} that are not counted."
        for name, found in results.items()
    ]
    return f"""\
# Two stages: the swarm against torch.distributed.pipelining

Written by `make bench ARGS=--record`; the numbers behind it are in `pipeline.json`. {facts["date"]}.

{facts["cpu"]}, {facts["cores"]} cores, {facts["memory_gib"]} GiB, Linux {facts["kernel"]}, Python {facts["python"]},
torch {facts["torch"]}. Load average while the bench began and ended: {facts["load"][0]:.1f} and {facts["load"][1]:.1f}.

{table}

{chr(10).join(shapes)}
- Both sides: the project's own layers, GRPO loss, clipping and AdamW, fp32, one thread, one core a stage, the same
  allocator settings, the same microbatches without padding. torch: gloo, 1F1B, batches prepared before the clock starts. The swarm: gRPC over
  loopback with `identity` links, rollouts that arrive during the tick, votes, a journal line on disk and published
  weights every tick; anchor and sampler share the two cores with the stages.
- *ratio*: swarm over torch in tokens/s, the median over pairs of neighbouring turns; *quartiles* and *range* of the same.
  *fastest ticks*: the same ratio for each side's fastest tick, which other load on the machine cannot have slowed.
  *CPU*: torch's CPU seconds per tick over the swarm's, both stages together.
- *waits*: the share of a tick in which a stage's compute thread had nothing to do, bubble included. *bubble*: what
  1F1B leaves idle with equal stages and free links; what is above it is spent on links, votes and imbalance.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", choices=sorted(WORKLOADS), help="one workload alone")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of turns (default %(default)s)")
    parser.add_argument("--record", action="store_true", help="write benchmarks/pipeline.md and .json")
    parser.add_argument("--keep", type=Path, help="a new folder for logs and runs (default: a temporary one)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the clauses that end the children
    load = os.getloadavg()[0]
    results = {}
    with tempfile.TemporaryDirectory(prefix="kedge-bench-") as temporary:
        folder = arguments.keep or Path(temporary)
        try:
            for name in [arguments.only] if arguments.only else WORKLOADS:
                results[name] = measure(WORKLOADS[name], folder / name, arguments.pairs)
        except BenchError as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
    facts = record.facts(load)
    page = report(results, facts)
    print(page)
    if arguments.record:
        record.write("pipeline", page, facts, {"results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
