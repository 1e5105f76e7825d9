"""From arrivals to figures and their tables. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from experiments import record
from experiments.links.pairs import Arrival
from swarm_core.wire.frames import chunk_count, message_bytes
from swarm_core.wire.framing import MESSAGE_PREFIX_BYTES, SEGMENT_BYTES

MB = 10**6
IP_HEADER_BYTES = 20 + 32  # IPv4, TCP with timestamps: the emulated link carries IP packets, no Ethernet


def ip_bytes(kind: str, size: int) -> int:
    """What a message costs on the emulated link, one way."""
    messages = chunk_count(size) if kind == "frames" else 1
    tcp = message_bytes(size) + messages * MESSAGE_PREFIX_BYTES if kind == "frames" else size
    return tcp + -(-tcp // SEGMENT_BYTES) * IP_HEADER_BYTES


def ideal_s(kind: str, size: int, mbps: float, delay_s: float) -> float:
    """The shortest time in which a message can be there: its bytes at the line rate, and the way."""
    return ip_bytes(kind, size) * 8 / (mbps * 1e6) + delay_s


def burst_gb_per_s(arrivals: Sequence[Arrival]) -> float:
    """From the first message's first byte to the last one's last."""
    return sum(a.size for a in arrivals) / (arrivals[-1].arrived_at - arrivals[0].sent_at) / 1e9


def line_mbps(kind: str, arrivals: Sequence[Arrival], delay_s: float) -> float:
    """Megabits a second of IP packets, from the first message's first byte to the last one's last, less the way."""
    took_s = arrivals[-1].arrived_at - arrivals[0].sent_at - delay_s
    return sum(ip_bytes(kind, a.size) for a in arrivals) * 8 / took_s / 1e6


def ratios(mine: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Medians of both, and of the ratio of neighbouring turns, which other load on the machine hits alike."""
    each = sorted(m / t for m, t in zip(mine, theirs, strict=True))
    quarter = len(each) // 4
    return {
        "frames": statistics.median(mine),
        "raw": statistics.median(theirs),
        "ratio": statistics.median(each),
        "quartiles": [each[quarter], each[-1 - quarter]],
        "turns": len(each),
    }


def ratio_table(what: str, unit: str, found: dict[str, dict[str, Any]], wanted: float) -> str:
    rows = [
        [
            name,
            f"{f['frames']:.2f}",
            f"{f['raw']:.2f}",
            f"{f['ratio']:.3f}",
            "{:.3f} .. {:.3f}".format(*f["quartiles"]),
            "yes" if f["ratio"] >= wanted else "NO",
        ]
        for name, f in found.items()
    ]
    head = [what, f"frames, {unit}", f"raw socket, {unit}", "ratio", "quartiles", f">= {wanted:g}"]
    return record.table(head, rows)


def latency_table(sizes: Sequence[int], found: dict[str, dict[str, list[float]]], limit: float) -> str:
    """Rows of (median ratio to the ideal, and the worst of them) for each size; `found` maps row -> size -> ratios."""
    rows = []
    for name, by_size in found.items():
        cells = [f"{statistics.median(by_size[str(s)]):.2f} ({max(by_size[str(s)]):.2f})" for s in sizes]
        met = all(statistics.median(by_size[str(s)]) <= limit for s in sizes)
        rows.append([name, *cells, "yes" if met else "no"])
    return record.table(["", *[f"{s / MB:g} MB" for s in sizes], f"medians <= {limit:g}"], rows)
