"""`make bench-wire`: the ledger's wire column beside the kernel's counters, in network namespaces (root, Linux).

Known frames over one stream, and with --demo whole runs with every process on a host of its own; with and without TLS,
over links as fast as the CPU and over slow ones. Segmentation offload is off: interfaces count what a cable would carry.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc

from experiments import record
from experiments.children import BenchError
from experiments.wire.calibration import Case, Direction, calibrate
from experiments.wire.demo import STAGES, Host, demo
from experiments.wire.network import MTU, congestion_control

SLOW = "100mbit"
# name, TLS, rate
SETTINGS = (("plain", False, None), (f"plain, {SLOW}", False, SLOW), ("TLS", True, None), (f"TLS, {SLOW}", True, SLOW))
Cases = list[tuple[Case, Direction, Direction]]


def both(down: Direction, up: Direction) -> float:
    return (down.ledger + up.ledger) / (down.interface + up.interface)


def calibration_table(found: dict[str, Cases]) -> str:
    """A row per case; per setting the ratio of the sending direction, and of both directions together."""
    head = ["frames"]
    for name in found:
        head += [f"{name}: sent", "both"]
    rows = []
    for of_case in zip(*found.values(), strict=True):
        cells = [of_case[0][0].name]
        for _, down, up in of_case:
            cells += [f"{down.ratio:.4f}", f"{both(down, up):.4f}"]
        rows.append(cells)
    total = ["all"]
    for cases in found.values():
        downs = sum(d.ledger for _, d, _ in cases) / sum(d.interface for _, d, _ in cases)
        ledger = sum(d.ledger + u.ledger for _, d, u in cases)
        total += [f"{downs:.4f}", f"{ledger / sum(d.interface + u.interface for _, d, u in cases):.4f}"]
    return record.table(head, [*rows, total])


def demo_table(runs: dict[str, list[Host]]) -> str:
    """A row per setting and process."""
    rows = [
        [
            name,
            host.name,
            *(f"{n:,}" for n in (host.message, host.ledger, host.interface)),
            f"{host.ratio:.4f}",
            str(host.repeated_segments),
        ]
        for name, hosts in runs.items()
        for host in hosts
    ]
    return record.table(("links", "process", "messages", "ledger's wire", "interface", "ratio", "repeated"), rows)


def report(found: dict[str, Cases], runs: dict[str, list[Host]], ticks: int, facts: dict[str, Any]) -> str:
    """The page that benchmarks/ keeps."""
    whole = (
        f"## A demo run of {ticks} ticks\n\n{demo_table(runs)}\n\n"
        "Bytes over the whole run, from before the first process starts until after the last has ended: anchor,\n"
        f"{STAGES} stages and a sampler in a namespace each, all on one bridge. *ledger's wire*: the wire column of\n"
        "`ledger.csv` summed by the process that sends. *interface*: the growth of its `tx_bytes`. *repeated*: segments\n"
        "that TCP sent again, up to 1.5 KB each, which the ledger cannot know. The promise is about *all*: what the\n"
        "sampler sends is mostly acknowledgements of weights, and the anchor hardly sends anything.\n\n"
        if runs
        else ""
    )
    return f"""\
# The ledger's wire column against the kernel's counters

Written by `make bench-wire ARGS="--demo --record"`; the numbers behind it are in `wire.json`. {facts["date"]}.

{facts["cpu"]}, {facts["cores"]} cores, Linux {facts["kernel"]}, Python {facts["python"]}, grpcio {facts["grpcio"]},
congestion control {facts["congestion_control"]}, MTU {MTU}, segmentation offload off (`gso_max_segs 1`).
Load average while the bench began and ended: {facts["load"][0]:.1f} and {facts["load"][1]:.1f}. Every ratio is ledger over
`tx_bytes`. `{SLOW}`: every upload shaped by `tc tbf`; otherwise the links are as fast as the CPU.

{whole}## Known frames over one stream

{calibration_table(found)}

*sent*: the direction the frames go. *both*: with what comes back, answers and acknowledgements. Without a limit a burst
of segments is acknowledged by next to nothing, at {SLOW} every second segment is: the ledger expects two in five, which
is why *both* of large frames lies up to 1.8 % high without a limit and up to 0.5 % low with it (docs/decisions/0006).
Retransmissions are in the interface's count and not in the ledger's; segments, acknowledgements and retransmitted
bytes of each case are in `wire.json`.
"""


def as_json(found: dict[str, Cases], runs: dict[str, list[Host]]) -> dict[str, Any]:
    return {
        "calibration": {
            name: {case.name: {"down": down.as_json(), "up": up.as_json()} for case, down, up in cases}
            for name, cases in found.items()
        },
        "demo": {name: [{**asdict(host), "ratio": host.ratio} for host in hosts] for name, hosts in runs.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-wire", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--demo", action="store_true", help="run the demo too, every process in a namespace of its own")
    parser.add_argument("--ticks", type=int, default=20, help="length of the demo (default %(default)s)")
    parser.add_argument("--only", choices=[name for name, _, _ in SETTINGS], help="one kind of link alone")
    parser.add_argument("--record", action="store_true", help="write benchmarks/wire.md and .json")
    parser.add_argument("--keep", type=Path, help="a new folder for logs and runs (default: a temporary one)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the clauses that end the children
    found: dict[str, Cases] = {}
    runs: dict[str, list[Host]] = {}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="kedge-wire-") as temporary:
        folder = arguments.keep or Path(temporary)
        try:
            for name, tls, rate in SETTINGS:
                if arguments.only in (None, name):
                    place = folder / name.replace(", ", "-")
                    found[name] = calibrate(place / "calibration", tls, rate)
                    print(f"{name}: calibrated", flush=True)
                    if arguments.demo:
                        runs[name] = demo(place / "demo", arguments.ticks, tls, rate)
                        print(f"{name}: demo, ledger / interface {runs[name][-1].ratio:.4f}", flush=True)
        except BenchError as error:
            print(f"bench-wire: {error}", file=sys.stderr)
            return 1
    facts = record.facts(load) | {"grpcio": grpc.__version__, "congestion_control": congestion_control()}
    page = report(found, runs, arguments.ticks, facts)
    print(page)
    if arguments.record:
        record.write("wire", page, facts, as_json(found, runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
