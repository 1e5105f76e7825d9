"""The byte ledger: what every frame cost, counted once, where it is sent. No I/O: rows in, sums out.

Columns: `dense` is what the same tensor would have cost in bf16 (for frames that carry no tensor: the payload itself),
`packet` the payload handed to the wire, `message` the whole gRPC messages (header and chunking included), `wire` what
an Ethernet interface sends for them (`framing.py`). What the receiver's kernel and gRPC answer, acknowledgements above
all, is expected where it is caused, and stands in the wire column of the control row (of beats: the beat row) of the opposite
direction.
"""

from __future__ import annotations

from swarm_core.wire.frames import FRAME_OVERHEAD, chunk_count, message_bytes
from swarm_core.wire.framing import OPENING, OPENING_TLS, Wire, frame_wire
from swarm_core.wire.messages import FrameKind, LedgerRow, Mode, Report, to_bytes

BEATS = "beat"  # signs of life: as many as a run has seconds, where everything else follows from what it does
KIND_OF: dict[FrameKind, str] = {
    FrameKind.ACTIVATION: "activation",
    FrameKind.GRADIENT: "gradient",
    FrameKind.BASIS: "basis",
    FrameKind.SKETCH: "sketch",
    FrameKind.WEIGHTS: "weights",
    FrameKind.BATCH: "rollout",
    FrameKind.ROLLOUTS: "rollout",
    FrameKind.SNAPSHOT: "snapshot",
    FrameKind.SLICE: "snapshot",
    FrameKind.CORRECTION: "correction",
    FrameKind.COPY: "state",
    FrameKind.BEAT: BEATS,
    FrameKind.WARM: BEATS,
    FrameKind.TRIAL: "probe",
    FrameKind.TRIED: "probe",
    FrameKind.LOAD: "probe",
}
KINDS = frozenset({*KIND_OF.values(), "control", "fidelity"})
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


# In one report: 2 MB. A process whose anchor was away for a day may have counted a million.
MOST_ROWS = 20_000
OPPOSITE = {"down": "up", "up": "down"}
Key = tuple[int, str, str, str]


class Ledger:
    """Sums per (tick, link, direction, kind); `take()` hands over what has been counted since the last call.

    `tls` says whether this process's streams are encrypted: it changes the wire column and nothing else.
    """

    def __init__(self, tls: bool = False) -> None:
        self.tls = tls
        self._sums: dict[Key, LedgerRow] = {}

    def count(
        self,
        tick: int,
        link: str,
        direction: str,
        kind: FrameKind,
        mode: Mode = Mode.TRAIN,
        *,
        dense: int | None,
        packet: int,
        message: int,
    ) -> None:
        """Count one frame of `packet` payload bytes that cost `message` bytes on the stream."""
        probe = mode is Mode.PROBE and kind in (FrameKind.ACTIVATION, FrameKind.GRADIENT)
        row = self._row(tick, link, direction, "fidelity" if probe else KIND_OF.get(kind, "control"))
        row.dense_bytes += packet if dense is None else dense
        row.packet_bytes += packet
        row.message_bytes += message
        row.frames += 1
        messages = max(1, (message - packet) // FRAME_OVERHEAD)
        wire = frame_wire(message, messages, self.tls, alone=kind in (FrameKind.WARM, FrameKind.BEAT))
        if kind is FrameKind.HELLO:  # the first frame of every stream pays for its connection
            wire = wire.plus(OPENING_TLS if self.tls else OPENING)
        self._count_wire(row, wire)

    def take_report(self, report: Report, tick: int, link: str, direction: str) -> bytes:
        """The payload of a REPORT frame with everything counted so far, that frame itself included.

        Numbers in a row have a fixed width, so the payload's size is known before its own rows are filled in. Of more than
        MOST_ROWS the oldest go; `waiting` tells how many are left.
        """
        own = self._row(tick, link, direction, "control")
        self._count_wire(own, Wire(0, 0))  # the row of the answer is part of the report
        later: dict[Key, LedgerRow] = {}
        if len(self._sums) > MOST_ROWS:
            others = self._sums.keys() - {(tick, link, way, "control") for way in OPPOSITE}
            later = {key: self._sums.pop(key) for key in sorted(others)[MOST_ROWS:]}
        report.ledger = self._rows()
        size = len(to_bytes(report))
        own.dense_bytes += size
        own.packet_bytes += size
        own.message_bytes += message_bytes(size)
        own.frames += 1
        self._count_wire(own, frame_wire(message_bytes(size), chunk_count(size), self.tls, alone=True))
        self._sums = later
        return to_bytes(report)

    @property
    def waiting(self) -> int:
        """Rows that nobody has taken yet."""
        return len(self._sums)

    def take(self) -> list[LedgerRow]:
        """The rows counted since the last call, in order; the ledger is empty afterwards."""
        rows = self._rows()
        self._sums = {}
        return rows

    def _rows(self) -> list[LedgerRow]:
        return [self._sums[key] for key in sorted(self._sums)]

    def _row(self, tick: int, link: str, direction: str, kind: str) -> LedgerRow:
        return self._sums.setdefault((tick, link, direction, kind), LedgerRow(tick, link, direction, kind))

    def _count_wire(self, row: LedgerRow, wire: Wire) -> None:
        row.wire_bytes += wire.sent
        kind = row.kind if row.kind == BEATS else "control"
        self._row(row.tick, row.link, OPPOSITE[row.direction], kind).wire_bytes += wire.answered
