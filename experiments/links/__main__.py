"""`make bench-links`: what the streams between neighbours cost over a bare socket, and what an idle pause costs a message.

Frames of the swarm and a blocking raw socket take turns, over loopback and over an emulated link; ratios are those of
neighbouring turns. Then single messages after idle pauses, against the shortest time that the link allows.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
from collections import defaultdict
from typing import Any

from deploy.wan.link import Host, WanError, wan
from experiments import record
from experiments.links.figures import (
    MB,
    burst_gb_per_s,
    ideal_s,
    latency_table,
    line_mbps,
    ratio_table,
    ratios,
)
from experiments.links.pairs import Pair
from swarm_core.wire.beats import KEEP_WARM_S
from swarm_core.wire.frames import chunk_count, message_bytes
from swarm_core.wire.framing import frame_wire

MBPS, DELAY_S, CONGESTION = 100.0, 0.040, "cubic"
LOOPBACK_SIZES = [4 * MB, 8 * MB, 16 * MB]
LOOPBACK_BYTES = 128 * MB  # a turn
SEQUENCE = [MB // 10, MB, 4 * MB, MB // 10, 16 * MB, MB, MB, 4 * MB]
SIZES = [MB // 10, MB, 4 * MB, 16 * MB]
GAPS_S = [0.0, 1.0, 3.0, 5.0]
LIMITS_MBPS = [20.0, 100.0, 400.0]


def loopback(turns: int) -> dict[str, dict[str, Any]]:
    """Streams of messages of one size between two processes, taking turns with a raw socket between two others."""
    pairs = {kind: Pair(kind) for kind in ("frames", "raw")}
    found = {}
    try:
        for pair in pairs.values():
            pair.send([LOOPBACK_SIZES[-1]] * 4)
        for size in LOOPBACK_SIZES:
            speeds: dict[str, list[float]] = defaultdict(list)
            for turn in range(turns):
                for kind in list(pairs) if turn % 2 else list(pairs)[::-1]:
                    speeds[kind].append(burst_gb_per_s(pairs[kind].send([size] * (LOOPBACK_BYTES // size))))
            found[f"{size // MB} MB"] = ratios(speeds["frames"], speeds["raw"])
            print(f"loopback, {size // MB} MB: ratio {found[f'{size // MB} MB']['ratio']:.3f}", flush=True)
    finally:
        for pair in pairs.values():
            pair.kill()
    return found


def steady(hosts: list[Host], turns: int) -> dict[str, dict[str, Any]]:
    """The same sequence of messages, back to back, over the emulated link, each turn after a message that opens the window."""
    pairs = {kind: Pair(kind, hosts) for kind in ("frames", "raw")}
    speeds: dict[str, list[float]] = defaultdict(list)
    try:
        for turn in range(turns):
            for kind in list(pairs) if turn % 2 else list(pairs)[::-1]:
                pairs[kind].send([16 * MB])
                speeds[kind].append(line_mbps(kind, pairs[kind].send(SEQUENCE), DELAY_S))
        used = {pair.congestion() for pair in pairs.values()}
    finally:
        for pair in pairs.values():
            pair.kill()
    name = f"{sum(SEQUENCE) / MB:g} MB in {len(SEQUENCE)} messages"
    found = ratios(speeds["frames"], speeds["raw"]) | {"congestion": "/".join(sorted(used))}
    print(f"emulated link, {name}: ratio {found['ratio']:.3f}", flush=True)
    return {name: found}


def pauses(hosts: list[Host], turns: int, *, warm: bool) -> tuple[dict[str, dict[str, list[float]]], dict[str, float]]:
    """One message after a pause: how much longer than the link needs for it. And what keeping warm cost."""
    pair = Pair("frames", hosts, warm=warm)
    found: dict[str, dict[str, list[float]]] = {
        "straight after traffic" if gap == 0 else f"after {gap:g} s": defaultdict(list) for gap in GAPS_S
    }
    cases = [(gap, size) for _ in range(turns) for gap in GAPS_S for size in SIZES]
    random.Random(0).shuffle(cases)  # a message leaves the window that the next one finds
    try:
        pair.send([16 * MB] * 3)
        for gap, size in cases:
            *_, arrival = pair.send([size], gap)
            name = "straight after traffic" if gap == 0 else f"after {gap:g} s"
            found[name][str(size)].append(arrival.took_s / ideal_s("frames", size, MBPS, DELAY_S))
        frames, counted_bytes = pair.close()
    finally:
        pair.kill()
    sums = {"frames": frames, "message_bytes": counted_bytes, "idle_s": sum(gap for gap, _ in cases)}
    print(f"pauses, keep-warm {'on' if warm else 'off'}: {frames} frames, {counted_bytes} bytes", flush=True)
    return found, sums


def cold(hosts: list[Host], turns: int) -> dict[str, dict[str, list[float]]]:
    """The first message of a connection."""
    found: dict[str, list[float]] = defaultdict(list)
    for size in SIZES:
        for _ in range(turns):
            pair = Pair("frames", hosts)
            try:
                (arrival,) = pair.send([size], 0.5)
                found[str(size)].append(arrival.took_s / ideal_s("frames", size, MBPS, DELAY_S))
            finally:
                pair.kill()
    return {"first message": found}


def limited() -> dict[str, float]:
    """What a sender under --limit-mbps really puts on the line, over the limit (loopback, so that nothing else bounds it)."""
    found = {}
    for mbps in LIMITS_MBPS:
        pair = Pair("frames", limit=f"{mbps:g}")
        size = int(mbps * 1e6 / 8)  # a second's worth
        try:
            first, *counted = pair.send([size] * 4)
        finally:
            pair.kill()
        line = sum(frame_wire(message_bytes(size), chunk_count(size)).sent for _ in counted)
        found[f"{mbps:g}"] = line * 8 / (counted[-1].arrived_at - first.arrived_at) / 1e6
    return found


def report(results: dict[str, Any], facts: dict[str, Any]) -> str:
    """The page that benchmarks/ keeps."""
    link = results.get("link")
    emulated = emulated_report(link) if link else f"Not measured: {results['skipped']}.\n"
    return f"""\
# Links: frames between neighbours against a raw socket, and what an idle pause costs

Written by `make bench-links ARGS=--record`; the numbers behind it are in `links.json`. {facts["date"]}.

{facts["cpu"]}, {facts["cores"]} cores, {facts["memory_gib"]} GiB, Linux {facts["kernel"]}, Python {facts["python"]}.
Load average while the bench began and ended: {facts["load"][0]:.1f} and {facts["load"][1]:.1f}.

## Loopback

{ratio_table("messages of", "GB/s", results["loopback"], 0.4)}

- Two processes a side, {LOOPBACK_BYTES // MB} MB a turn, turns alternate; medians, the ratio that of neighbouring turns. A raw
  message is one `sendall` from a buffer and `recv_into` another; a frame is cut into chunks, checksummed, carried by a
  gRPC stream, checked and joined. Both have the allocator settings of the stages.

## An emulated link: {MBPS:g} Mbit/s, {DELAY_S * 1e3:g} ms one way (round trip {2 * DELAY_S * 1e3:g} ms)

{emulated}
## A limit of one's own (`--limit-mbps`, loopback)

{record.table(["limit, Mbit/s", "sent, Mbit/s on the line"], [[mbps, f"{got:.1f}"] for mbps, got in results["limited"].items()])}
"""


def emulated_report(link: dict[str, Any]) -> str:
    """The part that needs root."""
    warm, plain = link["pauses"]["on"], link["pauses"]["off"]
    cost = link["keep_warm"]
    rows = {f"{name}, kept warm": by_size for name, by_size in warm.items()}
    rows |= {f"{name}, not kept warm": by_size for name, by_size in plain.items() if name.startswith("after")}
    rows |= link["cold"]
    return f"""\
{ratio_table("back to back", "Mbit/s on the link", link["steady"], 0.95)}

One message, in units of the shortest time there is: its bytes on the link / rate + one-way delay. Medians, the worst in
brackets:

{latency_table(SIZES, rows, 1.1)}

- The link is `python -m deploy.wan.link`: namespaces, TUN devices, a virtual clock. It counts IP packets, so a message's
  bytes are its chunks' headers, HTTP/2's and {20 + 32} bytes a segment of 1448 on top of the payload. Its queue holds a round trip and 50 ms.
- Congestion control: {next(iter(link["steady"].values()))["congestion"]}, pinned by the route; no sysctl is touched, so
  `tcp_slow_start_after_idle` is the kernel's 1. Times are one way: both ends read the same monotonic clock.
- *kept warm*: a WARM frame of no payload after every {KEEP_WARM_S * 1e3:g} ms without another, a BEAT every second. In {cost["idle_s"]:g} s of pauses the
  ledger counted {cost["frames"]:,.0f} of them, {cost["message_bytes"]:,.0f} message bytes: {cost["message_bytes"] / cost["idle_s"]:.0f} bytes per idle second.
  The order of pauses and sizes is shuffled; three messages of 16 MB went before. *first message*: of a new connection.
  Keeping warm holds the window that traffic has opened and opens none, so a first message is no faster with it.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-links", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--turns", type=int, default=9, help="turns of each side (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="messages after each pause (default %(default)s)")
    parser.add_argument("--record", action="store_true", help="write benchmarks/links.md and .json")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the clauses that end the children
    load = os.getloadavg()[0]
    results: dict[str, Any] = {"loopback": loopback(arguments.turns), "limited": limited()}
    try:
        with wan(rate_mbps=MBPS, delay_ms=DELAY_S * 1e3, congestion=CONGESTION) as hosts:
            link: dict[str, Any] = {"steady": steady(hosts, arguments.turns), "cold": cold(hosts, 3), "pauses": {}}
            link["pauses"]["on"], link["keep_warm"] = pauses(hosts, arguments.repeats, warm=True)
            link["pauses"]["off"], _ = pauses(hosts, min(3, arguments.repeats), warm=False)
            results["link"] = link
    except WanError as error:
        results["skipped"] = str(error)
        print(f"bench-links: the emulated link is left out: {error}", file=sys.stderr)
    facts = record.facts(load)
    page = report(results, facts)
    print(page)
    if arguments.record:
        record.write("links", page, facts, {"results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
