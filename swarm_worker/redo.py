"""The redo log of a stage: everything its compute thread was given since a version that lies on disk. Files only; no tensor.

A stage's state is a function of that version and of what it took in since, in order: batches, bases, corrections, packets
of its neighbours, decisions. What crosses the links is small, so it is cheaper to keep than a candidate of the weights
every tick. The log is on disk before a stage votes; so a process that was killed reaches every tick that was published.

    OUT/redo/stage-00-of-03/tick-00000020.log     from the checkpoint of tick 20 on (tick 0: from the model's files)

A file is a row of records: length, CRC-32, msgpack. The first one names the run's start and the version it begins with.
A torn tail is cut off: nothing that was voted on is in it.

A new file begins as soon as a checkpoint is decided, and its shard is written while ticks go on. Until a later record says
that it is on disk, the file only continues the one before it, which stays: what is rebuilt is rebuilt from further back.
"""

from __future__ import annotations

import enum
import logging
import os
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
from isal.isal_zlib import crc32

from swarm_core.durable import sync
from swarm_core.run_folder import MOST_LOST, REDO, log_name, stage_name
from swarm_core.wire.messages import Decide, Mode
from swarm_worker.headers import Position
from swarm_worker.schedule import Op, Stamp

log = logging.getLogger(__name__)
FORMAT = 2
HEAD = struct.Struct("<II")
Version = tuple[int, int]


class Kind(enum.IntEnum):
    """What a record is."""

    BASE = 0
    BATCH = 1  # BatchData
    BASES = 2  # BasisSet, whole
    CORRECTION = 3
    COMPUTE = 4  # a command of the schedule, with the packet it is about
    DECIDED = 5
    ROLLOUTS = 6  # stage 0: what a sampler delivered
    SHARD = 7  # the version that a file begins with is on disk


@dataclass(frozen=True)
class Record:
    """One of them. Which of the fields mean something depends on the kind."""

    kind: Kind
    payload: bytes = b""
    op: Op | None = None
    stamp: Stamp | None = None
    microbatch: int = 0  # of a BATCH on stage 0, and of ROLLOUTS: the number of the batch
    decide: Decide | None = None
    zero: dict[str, Any] | None = (
        None  # stage 0, with a decision: what it is to lead on with. BASE and SHARD: what they say
    )
    row: bytes = b""  # stage 0, with a decision: the Report of that tick


@dataclass
class _Segment:
    """One file: the version it begins with, and those that its decisions lead to."""

    path: Path
    shard: (
        str | None
    )  # sha256 of the shard with the version it begins with; empty: the run's own beginning; None: not there
    versions: list[Version]
    ends: list[int]  # byte behind each of them
    decided: list[Decide | None]  # what led to each of them
    voted: Stamp | None = None  # of a tick behind the last of them
    epoch: int = 0  # of the newest vote or decision
    bytes: int = 0
    shards: dict[int, str] = field(default_factory=dict)  # what records in it say of the shards of files, by tick


@dataclass(frozen=True)
class Extent:
    """A file of the log, as far as it is on disk."""

    path: Path
    base: int  # tick of the version it begins with
    shard: str | None  # as in _Segment
    bytes: int
    tick: int  # of the newest version in it


@dataclass(frozen=True)
class Extents:
    """All files of a log, oldest first. Within one `age` they only grow, or go; of another one nothing need be as it was."""

    age: int = 0
    start_id: int = 0
    files: tuple[Extent, ...] = ()
    epoch: int = 0  # of the newest vote or decision in them


class Redo:
    """The log of one stage below a run folder. The compute thread has it, but for `decide`: one thread at a time.

    `extents` may be read on any thread; `on_sync` is called, on the log's own thread, whenever it is another one.
    """

    def __init__(self, out: Path, stage: int, stages: int, digest: str) -> None:
        self.folder = out / REDO / stage_name(stage, stages)
        self._digest = digest
        self._file: BinaryIO | None = None
        self._segments: list[_Segment] = []
        self._stock: dict[int, Record] = {}  # rollouts whose batch has not begun: a new file needs them again
        self.start_id = 0
        self._alone = threading.Lock()  # between `decide` and `settle`: nothing else is done while a decision is made
        self.extents = Extents()
        self.on_sync: Callable[[], None] = lambda: None

    # Writing -----------------------------------------------------------------------------------------------------------

    def begin(self, start_id: int, base: Version, shard: str = "") -> None:
        """A run begins here, from a checkpoint or from the model: what lies here of another start goes."""
        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("tick-*.log"):
            path.unlink()
        self._segments, self.start_id, self._stock = [], start_id, {}
        self._open(base, shard, aged=True)

    def turn(self, base: Version) -> None:
        """Go on in a new file from this version on. It is a base once `settle` says that its shard is on disk."""
        if self._segments[-1].versions == [base]:
            return
        self.sync()
        self.close()
        self._open(base, None)

    def settle(self, tick: int, shard: str, keep: int) -> None:
        """The shard of the version that a file begins with is on disk: from now on what follows is rebuilt from it.

        It is on disk when this returns, and nobody may be told of the shard before: he might remove an older one. The
        files of the newest `keep` bases before the newest one stay (0: all), and those of the last MOST_LOST ticks.
        """
        with self._alone:
            for segment in self._segments:
                if segment.versions[0][0] == tick and segment.shard is None:
                    segment.shard = shard
                    self._note_shard(tick, shard)
            bases = [number for number, segment in enumerate(self._segments) if segment.shard is not None]
            first = self._first_to_keep(bases, keep) if keep else 0
            self.sync()
            for old in self._segments[:first]:
                old.path.unlink(missing_ok=True)
            self._segments = self._segments[first:]
            self._tell()

    def _first_to_keep(self, bases: list[int], keep: int) -> int:
        """Of the files that are bases, by number. A stage that is lost may come back with a copy that is so far behind."""
        back = self._segments[-1].versions[-1][0] - MOST_LOST
        reaching = [number for number in bases if self._segments[number].versions[0][0] <= back]
        return min(bases[-(keep + 1) :][0], reaching[-1] if reaching else 0)

    def decide(self, record: Record) -> None:
        """Stage 0, while nothing is computed: write a decision; it is on disk when this returns."""
        with self._alone:
            self.append(record)
            self.sync()

    def _note_shard(self, tick: int, shard: str) -> None:
        self._write(Kind.SHARD, {"tick": tick, "shard": shard}, b"")
        self._segments[-1].shards[tick] = shard

    def _open(self, base: Version, shard: str | None, *, aged: bool = False) -> None:
        path = self.folder / log_name(base[0])
        self._file = path.open("wb")
        self._segments.append(_Segment(path, shard, [base], [0], [None]))
        about = {"format": FORMAT, "digest": self._digest, "start": self.start_id, "shard": shard}
        about |= {"tick": base[0], "lineage": base[1]}
        self._segments[-1].ends[0] = self._write(Kind.BASE, about, b"")
        for record in list(self._stock.values()):
            self.append(record)
        self.sync(aged=aged)
        sync(self.folder)

    def append(self, record: Record) -> None:
        """Write a record; it is on disk after the next `sync`."""
        fields: dict[str, Any] = {}
        if record.stamp is not None:
            fields["stamp"] = astuple(record.stamp)
        if record.op is not None:
            fields["op"] = record.op.value
        if record.microbatch:
            fields["microbatch"] = record.microbatch
        if record.decide is not None:
            fields["decide"] = list(astuple(record.decide))
        if record.zero is not None:
            fields |= {"zero": record.zero, "row": record.row}
        if record.kind is Kind.ROLLOUTS:
            self._stock[record.microbatch] = record
        elif record.kind is Kind.BATCH:
            self._stock.pop(record.microbatch, None)
        end = self._write(record.kind, fields, record.payload)
        _note(self._segments[-1], record, end)

    def _write(self, kind: Kind, fields: dict[str, Any], payload: bytes | memoryview) -> int:
        assert self._file is not None, "a log is begun before it is written to"
        body = msgpack.packb([int(kind), fields, payload])
        self._file.write(HEAD.pack(len(body), crc32(body)))
        self._file.write(body)
        self._segments[-1].bytes += HEAD.size + len(body)
        return self._segments[-1].bytes

    def sync(self, *, aged: bool = False) -> None:
        """Wait until everything appended is on disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._tell(aged=aged)

    def _tell(self, *, aged: bool = False) -> None:
        files = (Extent(s.path, s.versions[0][0], s.shard, s.bytes, s.versions[-1][0]) for s in self._segments)
        epoch = max((s.epoch for s in self._segments), default=0)
        self.extents = Extents(self.extents.age + aged, self.start_id, tuple(files), epoch)
        self.on_sync()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    # What can be reached -----------------------------------------------------------------------------------------------

    def find(self) -> None:
        """Read what an earlier process has left. What is not of this manifest, or torn, is passed over.

        It is on disk when this returns: what a killed process had written, and not yet synced, is promised to others next.
        """
        self.close()
        self._segments = []
        for path in sorted(self.folder.glob("tick-*.log")):
            segment, about = _scan(path)
            if segment is None or about.get("digest") != self._digest or about.get("format") != FORMAT:
                log.warning("%s is passed over: it is not a redo log of this run", path)
                continue
            if self._segments and about["start"] != self.start_id:
                self._segments = []
            self.start_id = about["start"]
            self._segments.append(segment)
            sync(path)
        said = {tick: shard for segment in self._segments for tick, shard in segment.shards.items()}
        for segment in self._segments:
            segment.shard = said.get(segment.versions[0][0]) if segment.shard is None else segment.shard
        if self._segments:
            sync(self.folder)
        self._tell(aged=True)

    def versions(self, shards: set[int]) -> list[Version]:
        """The versions that can be rebuilt, oldest first; `shards` are the ticks of those that are there."""
        found: dict[int, Version] = {}
        for segment in self._segments:
            base = segment.versions[0]
            whole = segment.shard == "" or segment.shard is not None and base[0] in shards
            if whole or base == found.get(base[0]):
                found |= dict(zip([v[0] for v in segment.versions], segment.versions, strict=True))
        return [found[tick] for tick in sorted(found)]

    def bases(self, version: Version) -> list[tuple[int, str]]:
        """(tick, sha256 of the shard or empty) of what `version` can be rebuilt from, the nearest first."""
        past = [segment for segment in self._segments if segment.versions[0][0] <= version[0]]
        return [(segment.versions[0][0], segment.shard) for segment in reversed(past) if segment.shard is not None]

    def has_shard(self, version: Version) -> bool:
        """Whether this version is known to be in a shard."""
        return any(segment.versions[0] == version and segment.shard for segment in self._segments)

    @property
    def voted(self) -> Stamp | None:
        """The tick behind the newest version, if this stage has voted on it and not heard the decision."""
        return self._segments[-1].voted if self._segments else None

    @property
    def decided(self) -> Decide | None:
        """The decision that led to the newest version, where the log has it."""
        newest = self._segments[-1].versions[-1] if self._segments else None
        for segment in reversed(self._segments[-2:]):  # what led to the base of a file is in the file before it
            if segment.versions[-1] == newest and segment.decided[-1] is not None:
                return segment.decided[-1]
        return None

    def records(self, base: int, version: Version) -> Iterator[Record]:
        """From the base of that tick up to the decision that led to `version`; or, where that one is not here, all."""
        for segment in self._segments:
            if segment.versions[0] == version:
                return
            for _, record in _read(segment.path) if segment.versions[0][0] >= base else ():
                if record.kind not in (Kind.BASE, Kind.SHARD):
                    yield record
                if _leads_to(record) == version:
                    return

    def cut(self, version: Version) -> list[Record]:
        """Everything behind this version is of a future that is left: it goes, and the log is open behind it.

        Returns the rollouts that lay there: whoever begins here may still train on them.
        """
        self.close()
        self._stock = {}
        left: list[Record] = []
        while self._segments and self._segments[-1].versions[0][0] > version[0]:
            left = _rollouts(self._segments[-1], 0) + left
            self._segments.pop().path.unlink()
        segment = self._segments[-1]
        if version in segment.versions:
            at = segment.versions.index(version)
            left = _rollouts(segment, segment.ends[at]) + left
            segment.versions, segment.ends = segment.versions[: at + 1], segment.ends[: at + 1]
            segment.decided = segment.decided[: at + 1]
            segment.bytes = segment.ends[at]
        segment.voted = segment.voted if version not in segment.versions else None
        self._file = segment.path.open("r+b")
        self._file.truncate(segment.bytes)
        self._file.seek(segment.bytes)
        segment.shards = {}
        for older in self._segments:  # what said so may have been cut off; the shards are there all the same
            if older.shard:
                self._note_shard(older.versions[0][0], older.shard)
        self.sync(aged=True)
        sync(self.folder)  # a file of that future must not come back behind a power cut
        return left


def _note(segment: _Segment, record: Record, end: int) -> None:
    """What a record that ends at this byte means for what can be reached."""
    if record.kind is Kind.COMPUTE and record.op is Op.TALLY:
        segment.voted = record.stamp
        segment.epoch = record.stamp.epoch if record.stamp is not None else 0
    elif record.kind is Kind.SHARD and record.zero is not None:
        segment.shards[record.zero["tick"]] = record.zero["shard"]
    elif (version := _leads_to(record)) is not None:
        segment.versions.append(version)
        segment.ends.append(end)
        segment.decided.append(record.decide)
        segment.epoch = record.stamp.epoch if record.stamp is not None else 0
        segment.voted = None


def _leads_to(record: Record) -> Version | None:
    if record.kind is not Kind.DECIDED or record.stamp is None or record.decide is None:
        return None
    position = Position().after(record.stamp, record.decide)
    return position.tick, position.lineage


def _scan(path: Path) -> tuple[_Segment | None, dict[str, Any]]:
    """(what a file holds, what its first record says); None for a file without a whole first record."""
    segment, about = None, {}
    for end, record in _read(path):
        if segment is None:
            about = record.zero or {}
            if record.kind is not Kind.BASE or not {"tick", "lineage", "start"} <= about.keys():
                return None, {}
            segment = _Segment(path, about.get("shard"), [(about["tick"], about["lineage"])], [end], [None])
        else:
            _note(segment, record, end)
        segment.bytes = end
    return segment, about


def _read(path: Path) -> Iterator[tuple[int, Record]]:
    """(byte behind it, record) of the whole records of a file, up to the first torn one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        at = 0
        while len(head := file.read(HEAD.size)) == HEAD.size:
            length, checksum = HEAD.unpack(head)
            at += HEAD.size + length
            if at > size or crc32(body := file.read(length)) != checksum:
                log.warning("%s is torn: what lies behind byte %d is left out", path, at - HEAD.size - length)
                return
            yield at, _record(body)


def _record(body: bytes) -> Record:
    kind, fields, payload = msgpack.unpackb(body, strict_map_key=False)
    if kind in (Kind.BASE, Kind.SHARD):
        return Record(Kind(kind), zero=fields)
    stamp = list(fields["stamp"]) if "stamp" in fields else None
    if stamp is not None:
        stamp[4] = Mode(stamp[4])
    return Record(
        Kind(kind),
        payload,
        Op(fields["op"]) if "op" in fields else None,
        Stamp(*stamp) if stamp is not None else None,
        fields.get("microbatch", 0),
        Decide(*fields["decide"]) if "decide" in fields else None,
        fields.get("zero"),
        fields.get("row", b""),
    )


def _rollouts(segment: _Segment, start: int) -> list[Record]:
    return [record for end, record in _read(segment.path) if end > start and record.kind is Kind.ROLLOUTS]
