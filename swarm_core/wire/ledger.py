"""The byte ledger: what every frame cost, counted once, where it is sent. No I/O: rows in, sums out.

Columns: `dense` is what the same tensor would have cost in bf16 (for frames that carry no tensor: the payload itself),
`packet` the payload handed to the wire, `message` the whole gRPC messages (header and chunking included). The `wire`
column (HTTP/2, TLS, TCP) is exported empty until it is measured.
"""

from __future__ import annotations

from collections import defaultdict

from swarm_core.wire.frames import message_bytes
from swarm_core.wire.messages import FrameKind, LedgerRow, Report, to_bytes

KIND_OF: dict[FrameKind, str] = {
    FrameKind.ACTIVATION: "activation",
    FrameKind.GRADIENT: "gradient",
    FrameKind.BASIS: "basis",
    FrameKind.SKETCH: "sketch",
    FrameKind.WEIGHTS: "weights",
    FrameKind.BATCH: "rollout",
    FrameKind.ROLLOUTS: "rollout",
}
COLUMNS = (
    "tick",
    "link",
    "direction",
    "kind",
    "dense_bytes",
    "packet_bytes",
    "message_bytes",
    "wire_bytes",
    "frames",
)


class Ledger:
    """Sums per (tick, link, direction, kind); `take()` hands over what has been counted since the last call."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])

    def count(
        self, tick: int, link: str, direction: str, kind: FrameKind, *, dense: int | None, packet: int, message: int
    ) -> None:
        """Count one frame of `packet` payload bytes that cost `message` bytes on the stream."""
        row = self._sums[(tick, link, direction, KIND_OF.get(kind, "control"))]
        row[0] += packet if dense is None else dense
        row[1] += packet
        row[2] += message
        row[3] += 1

    def take_report(self, report: Report, tick: int, link: str, direction: str) -> bytes:
        """The payload of a REPORT frame with everything counted so far, that frame itself included.

        Numbers in a row have a fixed width, so the payload's size is known before its own row is filled in.
        """
        own = (tick, link, direction, "control")
        self._sums[own][3] += 1
        report.ledger = [LedgerRow(*key, *value) for key, value in sorted(self._sums.items())]
        size = len(to_bytes(report))
        row = next(r for r in report.ledger if (r.tick, r.link, r.direction, r.kind) == own)
        row.dense_bytes += size
        row.packet_bytes += size
        row.message_bytes += message_bytes(size)
        self._sums.clear()
        return to_bytes(report)

    def take(self) -> list[LedgerRow]:
        """The rows counted since the last call, in order; the ledger is empty afterwards."""
        rows = [LedgerRow(*key, *value) for key, value in sorted(self._sums.items())]
        self._sums.clear()
        return rows
