"""The messages inside control frames, as plain dataclasses, and their one conversion to and from protobuf.

The contract is proto/swarm_proto/v1/swarm.proto: field names here are the field names there, which is what lets two short
functions convert all of them. The rest of the house imports these classes and never sees a generated message.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, cast

from google.protobuf.message import DecodeError, Message

from swarm_core.wire.errors import BadFrame
from swarm_core.wire.parts import check_parts
from swarm_proto.v1 import swarm_pb2

PROTOCOL = 1


class FrameKind(enum.IntEnum):
    """What a frame carries; the numbers are those of the .proto file."""

    HELLO = 1
    WELCOME = 2
    READY = 3
    START = 4
    STOP = 5
    REPORT = 6
    SAVED = 7
    BATCH = 8
    BEGIN = 9
    ACTIVATION = 10
    GRADIENT = 11
    VOTE = 12
    DECIDE = 13
    ORDER = 14
    ROLLOUTS = 15
    FETCH = 16
    WEIGHTS = 17
    SKETCH = 18
    BASIS = 19
    WARM = 20
    RESEND = 21
    SNAPSHOT = 22
    SNAPSHOT_HELD = 23
    SLICE = 24
    CORRECTION = 25
    BOOKED = 26
    FENCE = 27
    HELD = 28
    COPY = 29
    COPY_HELD = 30
    COPIES = 31
    COPY_WANTED = 32
    CHECK = 33
    CHECKED = 34
    BEAT = 40
    STATUS = 41
    TRIAL = 42
    TRIED = 43
    LOAD = 44


class Mode(enum.IntEnum):
    """What a round is for."""

    TRAIN = 0
    SCORE = 1
    REFERENCE = 2
    DECODE = 3
    PROBE = 4


class Outcome(enum.IntEnum):
    """How stage 0 decided a tick."""

    HOLD = 0
    COMMIT = 1
    SKIP = 2
    RETRY = 3


@dataclass
class Hello:
    role: str = ""
    stage: int = 0
    replica: int = 0
    address: str = ""
    protocol: int = PROTOCOL
    manifest_digest: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    member: int = 0
    at_work: bool = False
    epoch: int = 0
    tick: int = 0
    basis_version: int = 0
    stalled: bool = False


@dataclass
class Welcome:
    manifest: str = ""
    manifest_digest: str = ""
    epoch: int = 0
    booked: int = 0


@dataclass
class Ready:
    parameters: int = 0
    parameter_bytes: int = 0
    model_fingerprint: str = ""


@dataclass
class Stop:
    reason: str = ""
    now: bool = False


@dataclass
class LedgerRow:
    tick: int = 0
    link: str = ""
    direction: str = ""
    kind: str = ""
    dense_bytes: int = 0
    packet_bytes: int = 0
    message_bytes: int = 0
    frames: int = 0
    wire_bytes: int = 0


@dataclass
class Report:
    type: str = ""
    tick: int = 0
    numbers: dict[str, float] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    ledger: list[LedgerRow] = field(default_factory=list)
    number: int = 0


@dataclass
class Booked:
    number: int = 0


@dataclass
class Beat:
    said_s: float = 0.0
    heard_s: float = 0.0
    held_s: float = 0.0
    phase: str = ""
    awaits: str = ""
    awaits_s: float = 0.0


@dataclass
class Status:
    json: str = ""


@dataclass
class Trial:
    what: str = ""
    load_bytes: int = 0
    port: int = 0
    nonce: bytes = b""


@dataclass
class Tried:
    clock_s: float = 0.0
    protocol: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    seen: str = ""
    run: str = ""
    phase: str = ""
    load_bytes: int = 0
    refused: str = ""


@dataclass
class Saved:
    tick: int = 0
    checkpoint: str = ""
    file: str = ""
    digest: str = ""
    bytes: int = 0


@dataclass
class Check:
    checkpoint: str = ""
    digest: str = ""


@dataclass
class Checked:
    checkpoint: str = ""
    wrong: str = ""


@dataclass
class BatchData:
    batch: int = 0
    weight_version: int = 0
    prompts: bytes = b""
    id_bytes: int = 4
    prompt_lengths: bytes = b""
    completion_lengths: bytes = b""
    slices: bytes = b""
    completion_ids: bytes = b""
    advantages: bytes = b""
    sampler_logprobs: bytes = b""
    loss_mask: bytes = b""
    slice_tokens: bytes = b""
    slice_sequences: bytes = b""


@dataclass
class Begin:
    microbatches: int = 0
    basis_version: int = 0
    correction: int = 0
    step: int = 0


@dataclass
class StageVote:
    stage: int = 0
    ready: bool = False
    basis_held: int = 0
    norms: list[float] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)
    fault: str = ""
    corrections_held: list[int] = field(default_factory=list)


@dataclass
class Vote:
    votes: list[StageVote] = field(default_factory=list)
    gated: bool = False


@dataclass
class Decide:
    outcome: int = Outcome.HOLD
    coefficient: float = 0.0
    end_of_batch: bool = False
    publish: bool = False
    checkpoint: bool = False
    stop: bool = False
    reason: str = ""


@dataclass
class Start:
    epoch: int = 0
    stage_addresses: list[str] = field(default_factory=list)
    checkpoint: str = ""
    shard_digests: dict[int, str] = field(default_factory=dict)
    start_id: int = 0
    recovery: bool = False
    tick: int = 0
    lineage: int = 0
    decide: Decide = field(default_factory=Decide)
    reported_tick: int = 0


@dataclass
class Fence:
    epoch: int = 0
    reason: str = ""


@dataclass
class Held:
    epoch: int = 0
    start_id: int = 0
    ticks: list[int] = field(default_factory=list)
    lineages: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    decided: Decide = field(default_factory=Decide)


@dataclass
class Order:
    batch: int = 0
    weight_version: int = 0
    generate: bool = False
    evaluate: bool = False


@dataclass
class Rollouts:
    batch: int = 0
    weight_version: int = 0
    group_size: int = 0
    exhausted: bool = False
    prompt_indices: bytes = b""
    prompt_lengths: bytes = b""
    completion_lengths: bytes = b""
    prompt_ids: bytes = b""
    completion_ids: bytes = b""
    logprobs: bytes = b""
    rewards: bytes = b""
    truncated: bytes = b""


@dataclass
class Fetch:
    version: int = 0


@dataclass
class BasisMatrix:
    boundary: int = 0
    direction: int = 0
    rows: int = 0
    columns: int = 0
    values: bytes = b""
    decoder: bytes = b""
    step: float = 0.0


@dataclass
class BasisSet:
    version: int = 0
    tick: int = 0
    matrices: list[BasisMatrix] = field(default_factory=list)
    base: int = 0
    delta: bool = False


@dataclass
class Sketch:
    version: int = 0
    tick: int = 0
    matrix: BasisMatrix = field(default_factory=BasisMatrix)
    part: int = 0
    trace: float = 0.0
    rows_seen: int = 0
    packet_bytes: int = 0


@dataclass
class Snapshot:
    version: int = 0
    tick: int = 0
    lineage: int = 0
    base: int = 0
    total_bytes: int = 0
    offset: int = 0
    part: bytes = b""
    digest: bytes = b""


@dataclass
class SnapshotHeld:
    version: int = 0
    bytes: int = 0
    whole: bool = False
    refused: str = ""


@dataclass
class Slice:
    version: int = 0
    tick: int = 0
    lineage: int = 0
    data: BatchData = field(default_factory=BatchData)
    prompt_ids: bytes = b""
    basis_version: int = 0
    reuse: int = 0
    old_logprobs: bytes = b""
    reference_logprobs: bytes = b""
    scored: bool = False


@dataclass
class Correction:
    version: int = 0
    tick: int = 0
    born: int = 0
    not_before: int = 0
    lineage: int = 0
    packet: bytes = b""
    digest: bytes = b""


@dataclass
class Copy:
    file: str = ""
    offset: int = 0
    before: int = 0
    part: bytes = b""
    digest: str = ""
    start_id: int = 0
    tick: int = 0
    newest: int = 0
    epoch: int = 0


@dataclass
class CopyHeld:
    file: str = ""
    bytes: int = 0
    checksum: int = 0
    whole: bool = False
    refused: str = ""


@dataclass
class Copies:
    start_id: int = 0
    files: list[CopyHeld] = field(default_factory=list)
    epoch: int = 0
    tick: int = 0


@dataclass
class CopyWanted:
    file: str = ""
    offset: int = 0


M = TypeVar("M")


def to_bytes(message: Any) -> bytes:
    """Serialise one of this module's dataclasses; maps in sorted order, so that equal messages give equal bytes."""
    return _to_proto(message).SerializeToString(deterministic=True)


def from_bytes(kind: type[M], data: bytes | bytearray | memoryview) -> M:
    """Parse a control payload. Raises BadFrame when it is not a `kind`, or has more parts than any may have."""
    proto, data = getattr(swarm_pb2, kind.__name__)(), bytes(data)
    check_parts(data, proto.DESCRIPTOR)
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise BadFrame(f"a {kind.__name__} message does not parse ({error}); the peer runs another version?") from None
    return _from_proto(kind, proto)


def _to_proto(message: Any) -> Message:
    proto = getattr(swarm_pb2, type(message).__name__)()
    for item in fields(message):
        value = getattr(message, item.name)
        if isinstance(value, list):
            getattr(proto, item.name).extend([_to_proto(v) if is_dataclass(v) else v for v in value])
        elif isinstance(value, dict):
            getattr(proto, item.name).update(value)
        elif is_dataclass(value):
            getattr(proto, item.name).CopyFrom(_to_proto(value))
        else:
            setattr(proto, item.name, value)
    return cast(Message, proto)


def _from_proto(kind: type[M], proto: Any) -> M:
    values: dict[str, Any] = {}
    for item in fields(kind):  # type: ignore[arg-type]
        value = getattr(proto, item.name)
        if isinstance(value, Message):
            value = _from_proto(globals()[type(value).__name__], value)
        elif hasattr(value, "items"):
            value = dict(value)
        elif not isinstance(value, (str, bytes, int, float)):
            value = [_from_proto(globals()[type(v).__name__], v) if isinstance(v, Message) else v for v in value]
        values[item.name] = value
    return kind(**values)
