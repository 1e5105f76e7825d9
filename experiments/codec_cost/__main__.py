"""`python -m experiments.codec_cost`: time of encode and decode against the bare products of a link, in turns on one core.

Each turn of a case has a turn of the bare side right before or after it, in alternation, so whatever else the machine
does hits both alike. A ratio is that of such a pair; what is reported is the median over pairs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from typing import Any

import torch

from codec.spec import dense_bytes
from experiments import record
from experiments.codec_cost.sides import ROWS, STEP, WIDTH, Case, Data, bare, cases, make_data
from swarm_core.wire.allocator import keep_large_blocks

BOUND = 1.25  # of uniform and bf16, whole
SETTLING = 3  # turns that are not counted
CLOCKS = {"cpu": time.thread_time_ns, "wall": time.perf_counter_ns}


def turn(case: Case) -> tuple[dict[str, list[float]], Any]:
    """Milliseconds of both halves by each clock, and what crossed."""
    took: dict[str, list[float]] = {name: [] for name in CLOCKS}
    carried = None
    for number, half in enumerate(case.halves):
        began = {name: clock() for name, clock in CLOCKS.items()}
        result = half() if number == 0 else half(carried)
        for name, clock in CLOCKS.items():
            took[name].append((clock() - began[name]) / 1e6)
        carried = result if number == 0 else carried
    case.after()
    return took, carried


def measure(data: Data, case: Case, pairs: int) -> dict[str, Any]:
    sides = {"bare": Case("bare", case.rank, bare(data, case.rank)), "codec": case}
    took: dict[str, list[dict[str, list[float]]]] = {name: [] for name in sides}
    crossed: Any = b""
    for number in range(SETTLING + pairs):
        for name in list(sides) if number % 2 else list(sides)[::-1]:
            found, carried = turn(sides[name])
            crossed = carried if name == "codec" else crossed
            if number >= SETTLING:
                took[name].append(found)
    result: dict[str, Any] = {"case": case.name, "rank": case.rank, "pairs": pairs, "limited": case.limited}
    if crossed:
        result["packet_bytes"] = len(crossed)
        result["share_of_dense"] = len(crossed) / dense_bytes(WIDTH, ROWS)
    for clock in CLOCKS:
        ours, theirs = ([each[clock] for each in took[name]] for name in ("codec", "bare"))
        whole = sorted(sum(a) / sum(b) for a, b in zip(ours, theirs, strict=True))
        result[clock] = {
            "ratio": statistics.median(whole),
            "ratio_quartiles": [whole[len(whole) // 4], whole[-1 - len(whole) // 4]],
            "encode_ratio": statistics.median(a[0] / b[0] for a, b in zip(ours, theirs, strict=True)),
            "decode_ratio": statistics.median(a[1] / b[1] for a, b in zip(ours, theirs, strict=True)),
            "codec_ms": [statistics.median(each[half] for each in ours) for half in (0, 1)],
            "bare_ms": [statistics.median(each[half] for each in theirs) for half in (0, 1)],
        }
    return result


def cells(found: dict[str, Any]) -> list[str]:
    cpu, wall = found["cpu"], found["wall"]
    return [
        str(found["rank"]),
        found["case"],
        f"{cpu['ratio']:.2f}",
        "{:.2f} .. {:.2f}".format(*cpu["ratio_quartiles"]),
        f"{wall['ratio']:.2f}",
        "{:.2f} .. {:.2f}".format(*wall["ratio_quartiles"]),
        f"{cpu['encode_ratio']:.2f}",
        f"{cpu['decode_ratio']:.2f}",
        "{:.1f} + {:.1f}".format(*cpu["codec_ms"]),
        "{:.1f} + {:.1f}".format(*cpu["bare_ms"]),
        f"{100 * found['share_of_dense']:.2f} %" if "share_of_dense" in found else "",
    ]


COLUMNS = (
    "rank", "what", "ratio, CPU", "quartiles", "ratio, wall", "quartiles", "encode", "decode", "codec ms", "bare ms",
    "packet",
)  # fmt: skip


def report(results: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The page that benchmarks/ keeps."""
    lines = [list(COLUMNS), ["--:", "---", *["--:"] * (len(COLUMNS) - 2)], *map(cells, results)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    limited = [found for found in results if found["limited"]]
    worst = max(limited, key=lambda found: found["cpu"]["ratio"])
    kept = "kept" if worst["cpu"]["ratio"] <= BOUND and worst["wall"]["ratio"] <= BOUND else "NOT kept"
    return f"""\
# The codec's time against its own matmuls

Written by `python -m experiments.codec_cost --record`; the numbers behind it are in `codec_cost.json`. {facts["date"]}.

{facts["cpu"]}, {facts["cores"]} cores, {facts["memory_gib"]} GiB, Linux {facts["kernel"]}, Python {facts["python"]},
torch {facts["torch"]}, one thread. Load average while the bench began and ended: {facts["load"][0]:.1f} and {facts["load"][1]:.1f}.

{table}

- The bound of {BOUND} on `uniform` and `bf16`, encode and decode together, is {kept}: the largest is
  {worst["cpu"]["ratio"]:.2f} (CPU) and {worst["wall"]["ratio"]:.2f} (wall), `{worst["case"]}` at rank {worst["rank"]}.
- {ROWS:,} rows x {WIDTH:,}, fp32, spectrum falling as 1 / j, 8 massive rows; an orthonormal basis, step {STEP:g}.
- *bare*: `(h @ E).to(bfloat16)`, then `y.to(float32) @ D`, operands contiguous. *codec*: `LinkCodec.encode` and `decode`, from rows
  to the packet's bytes and back, checks, checksums and zstd included; zstd `auto`.
- *ratio*: codec over bare, the median over {results[0]["pairs"]} pairs of neighbouring turns; *CPU* counts the thread's own time, which other load
  on the machine lengthens less than the wall clock. *encode*, *decode*: each half over its own half of bare, CPU.
- Below 1: the codec takes the product in parts that stay in the cache, and transposed, which this BLAS does faster.
- *changes*: the next pass over the same rows, moved by 2 %, with references on both ends. *sketch and fidelity*: what
  the sender of a packet computes beside it, on sampled rows; over the same bare products, and in no other line.
- *packet*: of the rows in bf16.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="experiments.codec_cost", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=40, help="pairs of turns a case (default %(default)s)")
    parser.add_argument("--record", action="store_true", help="write benchmarks/codec_cost.md and .json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_large_blocks()  # as every worker does
    load = os.getloadavg()[0]
    data, results = make_data(), []
    for case in cases(data):
        results.append(measure(data, case, arguments.pairs))
        cpu, wall = (results[-1][clock]["ratio"] for clock in CLOCKS)
        print(f"rank {case.rank}, {case.name}: {cpu:.2f} CPU, {wall:.2f} wall", flush=True)
    facts = record.facts(load)
    page = report(results, facts)
    print(page)
    if arguments.record:
        record.write("codec_cost", page, facts, {"results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
