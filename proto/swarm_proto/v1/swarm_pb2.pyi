from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FrameKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FRAME_KIND_UNSPECIFIED: _ClassVar[FrameKind]
    HELLO: _ClassVar[FrameKind]
    WELCOME: _ClassVar[FrameKind]
    READY: _ClassVar[FrameKind]
    START: _ClassVar[FrameKind]
    STOP: _ClassVar[FrameKind]
    REPORT: _ClassVar[FrameKind]
    SAVED: _ClassVar[FrameKind]
    BATCH: _ClassVar[FrameKind]
    BEGIN: _ClassVar[FrameKind]
    ACTIVATION: _ClassVar[FrameKind]
    GRADIENT: _ClassVar[FrameKind]
    VOTE: _ClassVar[FrameKind]
    DECIDE: _ClassVar[FrameKind]
    ORDER: _ClassVar[FrameKind]
    ROLLOUTS: _ClassVar[FrameKind]
    FETCH: _ClassVar[FrameKind]
    WEIGHTS: _ClassVar[FrameKind]
    SKETCH: _ClassVar[FrameKind]
    BASIS: _ClassVar[FrameKind]
    WARM: _ClassVar[FrameKind]
    RESEND: _ClassVar[FrameKind]
    SNAPSHOT: _ClassVar[FrameKind]
    SNAPSHOT_HELD: _ClassVar[FrameKind]
    SLICE: _ClassVar[FrameKind]
    CORRECTION: _ClassVar[FrameKind]
    BOOKED: _ClassVar[FrameKind]
    FENCE: _ClassVar[FrameKind]
    HELD: _ClassVar[FrameKind]
    COPY: _ClassVar[FrameKind]
    COPY_HELD: _ClassVar[FrameKind]
    COPIES: _ClassVar[FrameKind]
    COPY_WANTED: _ClassVar[FrameKind]
    CHECK: _ClassVar[FrameKind]
    CHECKED: _ClassVar[FrameKind]
    BEAT: _ClassVar[FrameKind]
    STATUS: _ClassVar[FrameKind]
    TRIAL: _ClassVar[FrameKind]
    TRIED: _ClassVar[FrameKind]
    LOAD: _ClassVar[FrameKind]

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRAIN: _ClassVar[Mode]
    SCORE: _ClassVar[Mode]
    REFERENCE: _ClassVar[Mode]
    DECODE: _ClassVar[Mode]
    PROBE: _ClassVar[Mode]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HOLD: _ClassVar[Outcome]
    COMMIT: _ClassVar[Outcome]
    SKIP: _ClassVar[Outcome]
    RETRY: _ClassVar[Outcome]
FRAME_KIND_UNSPECIFIED: FrameKind
HELLO: FrameKind
WELCOME: FrameKind
READY: FrameKind
START: FrameKind
STOP: FrameKind
REPORT: FrameKind
SAVED: FrameKind
BATCH: FrameKind
BEGIN: FrameKind
ACTIVATION: FrameKind
GRADIENT: FrameKind
VOTE: FrameKind
DECIDE: FrameKind
ORDER: FrameKind
ROLLOUTS: FrameKind
FETCH: FrameKind
WEIGHTS: FrameKind
SKETCH: FrameKind
BASIS: FrameKind
WARM: FrameKind
RESEND: FrameKind
SNAPSHOT: FrameKind
SNAPSHOT_HELD: FrameKind
SLICE: FrameKind
CORRECTION: FrameKind
BOOKED: FrameKind
FENCE: FrameKind
HELD: FrameKind
COPY: FrameKind
COPY_HELD: FrameKind
COPIES: FrameKind
COPY_WANTED: FrameKind
CHECK: FrameKind
CHECKED: FrameKind
BEAT: FrameKind
STATUS: FrameKind
TRIAL: FrameKind
TRIED: FrameKind
LOAD: FrameKind
TRAIN: Mode
SCORE: Mode
REFERENCE: Mode
DECODE: Mode
PROBE: Mode
HOLD: Outcome
COMMIT: Outcome
SKIP: Outcome
RETRY: Outcome

class Frame(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: FrameHeader
    payload: bytes
    def __init__(self, header: _Optional[_Union[FrameHeader, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class FrameHeader(_message.Message):
    __slots__ = ("run", "lineage", "kind", "mode", "epoch", "tick", "attempt", "batch", "slice", "microbatch", "receiver", "chunk", "chunks", "checksum", "total_bytes")
    RUN_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TICK_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    PASS_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    run: int
    lineage: int
    kind: int
    mode: int
    epoch: int
    tick: int
    attempt: int
    batch: int
    slice: int
    microbatch: int
    receiver: int
    chunk: int
    chunks: int
    checksum: int
    total_bytes: int
    def __init__(self, run: _Optional[int] = ..., lineage: _Optional[int] = ..., kind: _Optional[int] = ..., mode: _Optional[int] = ..., epoch: _Optional[int] = ..., tick: _Optional[int] = ..., attempt: _Optional[int] = ..., batch: _Optional[int] = ..., slice: _Optional[int] = ..., microbatch: _Optional[int] = ..., receiver: _Optional[int] = ..., chunk: _Optional[int] = ..., chunks: _Optional[int] = ..., checksum: _Optional[int] = ..., total_bytes: _Optional[int] = ..., **kwargs) -> None: ...

class Hello(_message.Message):
    __slots__ = ("role", "stage", "replica", "address", "protocol", "manifest_digest", "versions", "member", "at_work", "epoch", "tick", "basis_version", "stalled")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    AT_WORK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TICK_FIELD_NUMBER: _ClassVar[int]
    BASIS_VERSION_FIELD_NUMBER: _ClassVar[int]
    STALLED_FIELD_NUMBER: _ClassVar[int]
    role: str
    stage: int
    replica: int
    address: str
    protocol: int
    manifest_digest: str
    versions: _containers.ScalarMap[str, str]
    member: int
    at_work: bool
    epoch: int
    tick: int
    basis_version: int
    stalled: bool
    def __init__(self, role: _Optional[str] = ..., stage: _Optional[int] = ..., replica: _Optional[int] = ..., address: _Optional[str] = ..., protocol: _Optional[int] = ..., manifest_digest: _Optional[str] = ..., versions: _Optional[_Mapping[str, str]] = ..., member: _Optional[int] = ..., at_work: _Optional[bool] = ..., epoch: _Optional[int] = ..., tick: _Optional[int] = ..., basis_version: _Optional[int] = ..., stalled: _Optional[bool] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("manifest", "manifest_digest", "epoch", "booked")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BOOKED_FIELD_NUMBER: _ClassVar[int]
    manifest: str
    manifest_digest: str
    epoch: int
    booked: int
    def __init__(self, manifest: _Optional[str] = ..., manifest_digest: _Optional[str] = ..., epoch: _Optional[int] = ..., booked: _Optional[int] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("parameters", "parameter_bytes", "model_fingerprint")
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    parameters: int
    parameter_bytes: int
    model_fingerprint: str
    def __init__(self, parameters: _Optional[int] = ..., parameter_bytes: _Optional[int] = ..., model_fingerprint: _Optional[str] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("epoch", "stage_addresses", "checkpoint", "shard_digests", "start_id", "recovery", "tick", "lineage", "decide", "reported_tick")
    class ShardDigestsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STAGE_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    SHARD_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    START_ID_FIELD_NUMBER: _ClassVar[int]
    RECOVERY_FIELD_NUMBER: _ClassVar[int]
    TICK_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    DECIDE_FIELD_NUMBER: _ClassVar[int]
    REPORTED_TICK_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    stage_addresses: _containers.RepeatedScalarFieldContainer[str]
    checkpoint: str
    shard_digests: _containers.ScalarMap[int, str]
    start_id: int
    recovery: bool
    tick: int
    lineage: int
    decide: Decide
    reported_tick: int
    def __init__(self, epoch: _Optional[int] = ..., stage_addresses: _Optional[_Iterable[str]] = ..., checkpoint: _Optional[str] = ..., shard_digests: _Optional[_Mapping[int, str]] = ..., start_id: _Optional[int] = ..., recovery: _Optional[bool] = ..., tick: _Optional[int] = ..., lineage: _Optional[int] = ..., decide: _Optional[_Union[Decide, _Mapping]] = ..., reported_tick: _Optional[int] = ...) -> None: ...

class Fence(_message.Message):
    __slots__ = ("epoch", "reason")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    reason: str
    def __init__(self, epoch: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Held(_message.Message):
    __slots__ = ("epoch", "start_id", "ticks", "lineages", "pending", "decided")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    START_ID_FIELD_NUMBER: _ClassVar[int]
    TICKS_FIELD_NUMBER: _ClassVar[int]
    LINEAGES_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    DECIDED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    start_id: int
    ticks: _containers.RepeatedScalarFieldContainer[int]
    lineages: _containers.RepeatedScalarFieldContainer[int]
    pending: _containers.RepeatedScalarFieldContainer[int]
    decided: Decide
    def __init__(self, epoch: _Optional[int] = ..., start_id: _Optional[int] = ..., ticks: _Optional[_Iterable[int]] = ..., lineages: _Optional[_Iterable[int]] = ..., pending: _Optional[_Iterable[int]] = ..., decided: _Optional[_Union[Decide, _Mapping]] = ...) -> None: ...

class Copy(_message.Message):
    __slots__ = ("file", "offset", "before", "part", "digest", "start_id", "tick", "newest", "epoch")
    FILE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    START_ID_FIELD_NUMBER: _ClassVar[int]
    TICK_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    file: str
    offset: int
    before: int
    part: bytes
    digest: str
    start_id: int
    tick: int
    newest: int
    epoch: int
    def __init__(self, file: _Optional[str] = ..., offset: _Optional[int] = ..., before: _Optional[int] = ..., part: _Optional[bytes] = ..., digest: _Optional[str] = ..., start_id: _Optional[int] = ..., tick: _Optional[int] = ..., newest: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class CopyHeld(_message.Message):
    __slots__ = ("file", "bytes", "checksum", "whole", "refused")
    FILE_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    file: str
    bytes: int
    checksum: int
    whole: bool
    refused: str
    def __init__(self, file: _Optional[str] = ..., bytes: _Optional[int] = ..., checksum: _Optional[int] = ..., whole: _Optional[bool] = ..., refused: _Optional[str] = ...) -> None: ...

class Copies(_message.Message):
    __slots__ = ("start_id", "files", "epoch", "tick")
    START_ID_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TICK_FIELD_NUMBER: _ClassVar[int]
    start_id: int
    files: _containers.RepeatedCompositeFieldContainer[CopyHeld]
    epoch: int
    tick: int
    def __init__(self, start_id: _Optional[int] = ..., files: _Optional[_Iterable[_Union[CopyHeld, _Mapping]]] = ..., epoch: _Optional[int] = ..., tick: _Optional[int] = ...) -> None: ...

class CopyWanted(_message.Message):
    __slots__ = ("file", "offset")
    FILE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    file: str
    offset: int
    def __init__(self, file: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Stop(_message.Message):
    __slots__ = ("reason", "now")
    REASON_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    reason: str
    now: bool
    def __init__(self, reason: _Optional[str] = ..., now: _Optional[bool] = ...) -> None: ...

class LedgerRow(_message.Message):
    __slots__ = ("tick", "link", "direction", "kind", "dense_bytes", "packet_bytes", "message_bytes", "frames", "wire_bytes")
    TICK_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DENSE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PACKET_BYTES_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    WIRE_BYTES_FIELD_NUMBER: _ClassVar[int]
    tick: int
    link: str
    direction: str
    kind: str
    dense_bytes: int
    packet_bytes: int
    message_bytes: int
    frames: int
    wire_bytes: int
    def __init__(self, tick: _Optional[int] = ..., link: _Optional[str] = ..., direction: _Optional[str] = ..., kind: _Optional[str] = ..., dense_bytes: _Optional[int] = ..., packet_bytes: _Optional[int] = ..., message_bytes: _Optional[int] = ..., frames: _Optional[int] = ..., wire_bytes: _Optional[int] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("type", "tick", "numbers", "words", "ledger", "number")
    class NumbersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class WordsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TYPE_FIELD_NUMBER: _ClassVar[int]
    TICK_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    type: str
    tick: int
    numbers: _containers.ScalarMap[str, float]
    words: _containers.ScalarMap[str, str]
    ledger: _containers.RepeatedCompositeFieldContainer[LedgerRow]
    number: int
    def __init__(self, type: _Optional[str] = ..., tick: _Optional[int] = ..., numbers: _Optional[_Mapping[str, float]] = ..., words: _Optional[_Mapping[str, str]] = ..., ledger: _Optional[_Iterable[_Union[LedgerRow, _Mapping]]] = ..., number: _Optional[int] = ...) -> None: ...

class Booked(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("said_s", "heard_s", "held_s", "phase", "awaits", "awaits_s")
    SAID_S_FIELD_NUMBER: _ClassVar[int]
    HEARD_S_FIELD_NUMBER: _ClassVar[int]
    HELD_S_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    AWAITS_FIELD_NUMBER: _ClassVar[int]
    AWAITS_S_FIELD_NUMBER: _ClassVar[int]
    said_s: float
    heard_s: float
    held_s: float
    phase: str
    awaits: str
    awaits_s: float
    def __init__(self, said_s: _Optional[float] = ..., heard_s: _Optional[float] = ..., held_s: _Optional[float] = ..., phase: _Optional[str] = ..., awaits: _Optional[str] = ..., awaits_s: _Optional[float] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class Trial(_message.Message):
    __slots__ = ("what", "load_bytes", "port", "nonce")
    WHAT_FIELD_NUMBER: _ClassVar[int]
    LOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    what: str
    load_bytes: int
    port: int
    nonce: bytes
    def __init__(self, what: _Optional[str] = ..., load_bytes: _Optional[int] = ..., port: _Optional[int] = ..., nonce: _Optional[bytes] = ...) -> None: ...

class Tried(_message.Message):
    __slots__ = ("clock_s", "protocol", "versions", "seen", "run", "phase", "load_bytes", "refused")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CLOCK_S_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    LOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    clock_s: float
    protocol: int
    versions: _containers.ScalarMap[str, str]
    seen: str
    run: str
    phase: str
    load_bytes: int
    refused: str
    def __init__(self, clock_s: _Optional[float] = ..., protocol: _Optional[int] = ..., versions: _Optional[_Mapping[str, str]] = ..., seen: _Optional[str] = ..., run: _Optional[str] = ..., phase: _Optional[str] = ..., load_bytes: _Optional[int] = ..., refused: _Optional[str] = ...) -> None: ...

class Saved(_message.Message):
    __slots__ = ("tick", "checkpoint", "file", "digest", "bytes")
    TICK_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    tick: int
    checkpoint: str
    file: str
    digest: str
    bytes: int
    def __init__(self, tick: _Optional[int] = ..., checkpoint: _Optional[str] = ..., file: _Optional[str] = ..., digest: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class Check(_message.Message):
    __slots__ = ("checkpoint", "digest")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    checkpoint: str
    digest: str
    def __init__(self, checkpoint: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class Checked(_message.Message):
    __slots__ = ("checkpoint", "wrong")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    WRONG_FIELD_NUMBER: _ClassVar[int]
    checkpoint: str
    wrong: str
    def __init__(self, checkpoint: _Optional[str] = ..., wrong: _Optional[str] = ...) -> None: ...

class BatchData(_message.Message):
    __slots__ = ("batch", "weight_version", "prompts", "id_bytes", "prompt_lengths", "completion_lengths", "slices", "completion_ids", "advantages", "sampler_logprobs", "loss_mask", "slice_tokens", "slice_sequences")
    BATCH_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    ID_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_IDS_FIELD_NUMBER: _ClassVar[int]
    ADVANTAGES_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOSS_MASK_FIELD_NUMBER: _ClassVar[int]
    SLICE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SLICE_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    batch: int
    weight_version: int
    prompts: bytes
    id_bytes: int
    prompt_lengths: bytes
    completion_lengths: bytes
    slices: bytes
    completion_ids: bytes
    advantages: bytes
    sampler_logprobs: bytes
    loss_mask: bytes
    slice_tokens: bytes
    slice_sequences: bytes
    def __init__(self, batch: _Optional[int] = ..., weight_version: _Optional[int] = ..., prompts: _Optional[bytes] = ..., id_bytes: _Optional[int] = ..., prompt_lengths: _Optional[bytes] = ..., completion_lengths: _Optional[bytes] = ..., slices: _Optional[bytes] = ..., completion_ids: _Optional[bytes] = ..., advantages: _Optional[bytes] = ..., sampler_logprobs: _Optional[bytes] = ..., loss_mask: _Optional[bytes] = ..., slice_tokens: _Optional[bytes] = ..., slice_sequences: _Optional[bytes] = ...) -> None: ...

class Begin(_message.Message):
    __slots__ = ("microbatches", "basis_version", "correction", "step")
    MICROBATCHES_FIELD_NUMBER: _ClassVar[int]
    BASIS_VERSION_FIELD_NUMBER: _ClassVar[int]
    CORRECTION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    microbatches: int
    basis_version: int
    correction: int
    step: int
    def __init__(self, microbatches: _Optional[int] = ..., basis_version: _Optional[int] = ..., correction: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class StageVote(_message.Message):
    __slots__ = ("stage", "ready", "basis_held", "norms", "numbers", "fault", "corrections_held")
    class NumbersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STAGE_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    BASIS_HELD_FIELD_NUMBER: _ClassVar[int]
    NORMS_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    CORRECTIONS_HELD_FIELD_NUMBER: _ClassVar[int]
    stage: int
    ready: bool
    basis_held: int
    norms: _containers.RepeatedScalarFieldContainer[float]
    numbers: _containers.ScalarMap[str, float]
    fault: str
    corrections_held: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, stage: _Optional[int] = ..., ready: _Optional[bool] = ..., basis_held: _Optional[int] = ..., norms: _Optional[_Iterable[float]] = ..., numbers: _Optional[_Mapping[str, float]] = ..., fault: _Optional[str] = ..., corrections_held: _Optional[_Iterable[int]] = ...) -> None: ...

class Vote(_message.Message):
    __slots__ = ("votes", "gated")
    VOTES_FIELD_NUMBER: _ClassVar[int]
    GATED_FIELD_NUMBER: _ClassVar[int]
    votes: _containers.RepeatedCompositeFieldContainer[StageVote]
    gated: bool
    def __init__(self, votes: _Optional[_Iterable[_Union[StageVote, _Mapping]]] = ..., gated: _Optional[bool] = ...) -> None: ...

class Decide(_message.Message):
    __slots__ = ("outcome", "coefficient", "end_of_batch", "publish", "checkpoint", "stop", "reason")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    COEFFICIENT_FIELD_NUMBER: _ClassVar[int]
    END_OF_BATCH_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    outcome: int
    coefficient: float
    end_of_batch: bool
    publish: bool
    checkpoint: bool
    stop: bool
    reason: str
    def __init__(self, outcome: _Optional[int] = ..., coefficient: _Optional[float] = ..., end_of_batch: _Optional[bool] = ..., publish: _Optional[bool] = ..., checkpoint: _Optional[bool] = ..., stop: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class Order(_message.Message):
    __slots__ = ("batch", "weight_version", "generate", "evaluate")
    BATCH_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    batch: int
    weight_version: int
    generate: bool
    evaluate: bool
    def __init__(self, batch: _Optional[int] = ..., weight_version: _Optional[int] = ..., generate: _Optional[bool] = ..., evaluate: _Optional[bool] = ...) -> None: ...

class Rollouts(_message.Message):
    __slots__ = ("batch", "weight_version", "group_size", "exhausted", "prompt_indices", "prompt_lengths", "completion_lengths", "prompt_ids", "completion_ids", "logprobs", "rewards", "truncated")
    BATCH_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    EXHAUSTED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_INDICES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    REWARDS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    batch: int
    weight_version: int
    group_size: int
    exhausted: bool
    prompt_indices: bytes
    prompt_lengths: bytes
    completion_lengths: bytes
    prompt_ids: bytes
    completion_ids: bytes
    logprobs: bytes
    rewards: bytes
    truncated: bytes
    def __init__(self, batch: _Optional[int] = ..., weight_version: _Optional[int] = ..., group_size: _Optional[int] = ..., exhausted: _Optional[bool] = ..., prompt_indices: _Optional[bytes] = ..., prompt_lengths: _Optional[bytes] = ..., completion_lengths: _Optional[bytes] = ..., prompt_ids: _Optional[bytes] = ..., completion_ids: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., rewards: _Optional[bytes] = ..., truncated: _Optional[bytes] = ...) -> None: ...

class Fetch(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class BasisMatrix(_message.Message):
    __slots__ = ("boundary", "direction", "rows", "columns", "values", "decoder", "step")
    BOUNDARY_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    DECODER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    boundary: int
    direction: int
    rows: int
    columns: int
    values: bytes
    decoder: bytes
    step: float
    def __init__(self, boundary: _Optional[int] = ..., direction: _Optional[int] = ..., rows: _Optional[int] = ..., columns: _Optional[int] = ..., values: _Optional[bytes] = ..., decoder: _Optional[bytes] = ..., step: _Optional[float] = ...) -> None: ...

class BasisSet(_message.Message):
    __slots__ = ("version", "tick", "matrices", "base", "delta")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TICK_FIELD_NUMBER: _ClassVar[int]
    MATRICES_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    version: int
    tick: int
    matrices: _containers.RepeatedCompositeFieldContainer[BasisMatrix]
    base: int
    delta: bool
    def __init__(self, version: _Optional[int] = ..., tick: _Optional[int] = ..., matrices: _Optional[_Iterable[_Union[BasisMatrix, _Mapping]]] = ..., base: _Optional[int] = ..., delta: _Optional[bool] = ...) -> None: ...

class Sketch(_message.Message):
    __slots__ = ("version", "tick", "matrix", "part", "trace", "rows_seen", "packet_bytes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TICK_FIELD_NUMBER: _ClassVar[int]
    MATRIX_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    ROWS_SEEN_FIELD_NUMBER: _ClassVar[int]
    PACKET_BYTES_FIELD_NUMBER: _ClassVar[int]
    version: int
    tick: int
    matrix: BasisMatrix
    part: int
    trace: float
    rows_seen: int
    packet_bytes: int
    def __init__(self, version: _Optional[int] = ..., tick: _Optional[int] = ..., matrix: _Optional[_Union[BasisMatrix, _Mapping]] = ..., part: _Optional[int] = ..., trace: _Optional[float] = ..., rows_seen: _Optional[int] = ..., packet_bytes: _Optional[int] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("version", "tick", "lineage", "base", "total_bytes", "offset", "part", "digest")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TICK_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    version: int
    tick: int
    lineage: int
    base: int
    total_bytes: int
    offset: int
    part: bytes
    digest: bytes
    def __init__(self, version: _Optional[int] = ..., tick: _Optional[int] = ..., lineage: _Optional[int] = ..., base: _Optional[int] = ..., total_bytes: _Optional[int] = ..., offset: _Optional[int] = ..., part: _Optional[bytes] = ..., digest: _Optional[bytes] = ...) -> None: ...

class SnapshotHeld(_message.Message):
    __slots__ = ("version", "bytes", "whole", "refused")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    version: int
    bytes: int
    whole: bool
    refused: str
    def __init__(self, version: _Optional[int] = ..., bytes: _Optional[int] = ..., whole: _Optional[bool] = ..., refused: _Optional[str] = ...) -> None: ...

class Slice(_message.Message):
    __slots__ = ("version", "tick", "lineage", "data", "prompt_ids", "basis_version", "reuse", "old_logprobs", "reference_logprobs", "scored")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TICK_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    BASIS_VERSION_FIELD_NUMBER: _ClassVar[int]
    REUSE_FIELD_NUMBER: _ClassVar[int]
    OLD_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIELD_NUMBER: _ClassVar[int]
    version: int
    tick: int
    lineage: int
    data: BatchData
    prompt_ids: bytes
    basis_version: int
    reuse: int
    old_logprobs: bytes
    reference_logprobs: bytes
    scored: bool
    def __init__(self, version: _Optional[int] = ..., tick: _Optional[int] = ..., lineage: _Optional[int] = ..., data: _Optional[_Union[BatchData, _Mapping]] = ..., prompt_ids: _Optional[bytes] = ..., basis_version: _Optional[int] = ..., reuse: _Optional[int] = ..., old_logprobs: _Optional[bytes] = ..., reference_logprobs: _Optional[bytes] = ..., scored: _Optional[bool] = ...) -> None: ...

class Correction(_message.Message):
    __slots__ = ("version", "tick", "born", "not_before", "lineage", "packet", "digest")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TICK_FIELD_NUMBER: _ClassVar[int]
    BORN_FIELD_NUMBER: _ClassVar[int]
    NOT_BEFORE_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    PACKET_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    version: int
    tick: int
    born: int
    not_before: int
    lineage: int
    packet: bytes
    digest: bytes
    def __init__(self, version: _Optional[int] = ..., tick: _Optional[int] = ..., born: _Optional[int] = ..., not_before: _Optional[int] = ..., lineage: _Optional[int] = ..., packet: _Optional[bytes] = ..., digest: _Optional[bytes] = ...) -> None: ...
