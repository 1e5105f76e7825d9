"""Copies of what stages on other hosts hold: their logs, their newest shards, stage 0's journal, on the anchor's volume.

    OUT/copies/stage-01-of-03/          laid out as that worker's own --out; `about.json` beside it
        redo/stage-01-of-03/tick-*.log
        checkpoints/tick-*/stage-01-of-03.safetensors      whole and checked; `.part` until then

A stage of which only this is left is begun anew from it. Files only here: what a stage says is checked against what lies
there, part by part, so that neither end need remember where a transfer broke off (swarm_worker/copying.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from isal.isal_zlib import crc32

from anchor_node.checkpoints import found
from swarm_core.durable import replace
from swarm_core.run_folder import CHECKPOINTS, copied_files, stage_name
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import Copies, Copy, CopyHeld, CopyWanted

FOLDER, ABOUT = "copies", "about.json"
PART = ".part"
MOST_BYTES = 3 << 20  # of a part
LEAST_FREE_BYTES = 1 << 30  # that a copy leaves for the books and the anchor's own
MOST_FILES = 10_000  # logs go when a shard is whole, so that a run has a handful
READ_BYTES = 16 << 20
log = logging.getLogger(__name__)


class StageCopy:
    """The copy of one stage. Its methods read and write files: one call at a time, off the event loop."""

    def __init__(self, out: Path, stage: int, stages: int) -> None:
        self.folder = out / FOLDER / stage_name(stage, stages)
        self.tick = 0  # ticks that could be rebuilt from it, as far as the stage has said since this process began
        self._out, self._stage = out, stage
        self._names = copied_files(stage, stages)
        self._known: dict[str, tuple[int, int]] = {}  # (bytes, CRC-32) of files that were written to
        self._newest = -1  # tick of the newest log that the stage has, as far as it has said
        self._about = _read_about(self.folder / ABOUT)

    @property
    def start_id(self) -> int:
        """The start of the run that the copy is of; 0: there is none."""
        return self._about.start_id

    def check(self, message: Copy | CopyWanted) -> re.Match[str]:
        """What can be said without a look at the disk. Raises BadFrame for what no stage sends."""
        match = self._names.fullmatch(message.file)
        if match is None:
            raise BadFrame(
                f"stage {self._stage} names {message.file[:99]!r}, which is no file of its own that is copied"
            )
        if isinstance(message, Copy) and len(message.part) > MOST_BYTES:
            raise BadFrame(
                f"stage {self._stage} sent {len(message.part)} bytes of {match[0]}; a part has {MOST_BYTES} at most"
            )
        return match

    def take(self, copy: Copy, start_id: int) -> CopyHeld:
        """A part, or a question (an empty part): what is there afterwards. Raises as `check`."""
        name = self.check(copy)
        if copy.start_id != start_id:
            return CopyHeld(copy.file, refused="it is of another start of the run")
        if self.start_id != start_id:
            self._begin(start_id)
        if copy.newest != self._newest:
            self._drop(lambda tick: tick > copy.newest)
            self._newest = copy.newest
        if copy.file in self._about.digests and self._about.digests[copy.file] == copy.digest:
            return CopyHeld(copy.file, (self.folder / copy.file).stat().st_size, whole=True)
        shard = bool(name["shard"])
        path = self.folder / (copy.file + PART if shard else copy.file)
        if not path.exists() and sum(1 for p in self.folder.rglob("tick-*")) >= MOST_FILES:
            return CopyHeld(copy.file, refused=f"there are {MOST_FILES} files of this stage already")
        free = shutil.disk_usage(self._out).free
        if copy.part and free < LEAST_FREE_BYTES + len(copy.part):
            return self._held(copy.file, path, f"the anchor's disk has {free >> 20} MiB left")
        self._append(path, copy)
        if shard and copy.digest:
            return self._finish(path, copy, int(name["shard"]))
        held = self._held(copy.file, path)
        if copy.tick and held.bytes == copy.offset + len(copy.part):
            self.tick = copy.tick
        return held

    def listed(self) -> Copies:
        """Everything that a stage is begun from, with its checksums."""
        paths = [p for p in self.folder.rglob("*") if p.is_file() and self._names.fullmatch(self._name(p))]
        files = [CopyHeld(self._name(p), *_sum(p, p.stat().st_size)) for p in sorted(paths)]
        return Copies(self.start_id, files) if files else Copies()

    def read(self, wanted: CopyWanted) -> Copy:
        """A part of a listed file; an empty one where there is none. Raises as `check`."""
        self.check(wanted)
        path = self.folder / wanted.file
        if not path.is_file() or wanted.offset > path.stat().st_size:
            return Copy(wanted.file, wanted.offset)
        with path.open("rb") as file:
            file.seek(wanted.offset)
            return Copy(wanted.file, wanted.offset, part=file.read(MOST_BYTES))

    def has_shard(self, checkpoint: str) -> bool:
        """Whether this stage's shard of a checkpoint is here, whole."""
        return any(name.startswith(f"{CHECKPOINTS}/{checkpoint}/") for name in self._about.digests)

    def link_into_checkpoints(self) -> None:
        """Shards of complete checkpoints are found there, too, so that they are exported and pruned as any other."""
        for checkpoint in found(self._out):
            saved = checkpoint.shards.get(self._stage)
            if saved is None:
                continue
            copied = f"{CHECKPOINTS}/{checkpoint.name}/{saved.file}"
            if self._about.digests.get(copied) == saved.digest and not (self._out / copied).exists():
                _link(self.folder / copied, self._out / copied)

    # Inside ------------------------------------------------------------------------------------------------------------

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.folder))

    def _begin(self, start_id: int) -> None:
        """What lies here is of an earlier start: nobody goes back to it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._known, self._about, self.tick = {}, _About(start_id), 0
        self._keep_about()

    def _keep_about(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        replace(self.folder / ABOUT, json.dumps(asdict(self._about)).encode())

    def _append(self, path: Path, copy: Copy) -> None:
        """Write a part behind the bytes that it follows; leave the file alone where those are not the ones here."""
        size, checksum = self._size_and_sum(copy.file, path)
        if copy.offset > size:
            return
        if copy.offset < size and copy.offset:
            checksum = _sum(path, copy.offset)[1]
        if copy.offset and checksum != copy.before:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if path.exists() else "wb") as file:
            file.truncate(copy.offset)
            file.seek(copy.offset)
            file.write(copy.part)
        self._known[copy.file] = copy.offset + len(copy.part), crc32(copy.part, copy.before if copy.offset else 0)

    def _size_and_sum(self, name: str, path: Path) -> tuple[int, int]:
        if name not in self._known:
            self._known[name] = _sum(path, path.stat().st_size) if path.exists() else (0, 0)
        return self._known[name]

    def _held(self, name: str, path: Path, refused: str = "") -> CopyHeld:
        size, checksum = self._size_and_sum(name, path)
        return CopyHeld(name, size, checksum, refused=refused)

    def _finish(self, path: Path, copy: Copy, tick: int) -> CopyHeld:
        """A shard has all its bytes, or not yet: once its digest is right it counts, and what lies before it goes."""
        held = self._held(copy.file, path)
        if not held.bytes or held.bytes != copy.offset + len(copy.part):
            return held
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        self._known.pop(copy.file, None)
        if digest != copy.digest:
            path.unlink()
            return CopyHeld(copy.file, refused=f"its sha256 is {digest[:12]}..., wanted {copy.digest[:12]}...")
        path.replace(self.folder / copy.file)
        self._about.digests[copy.file] = digest
        self._drop(lambda other: other < tick)
        self._keep_about()
        self.link_into_checkpoints()
        return CopyHeld(copy.file, held.bytes, held.checksum, whole=True)

    def _drop(self, useless: Callable[[int], bool]) -> None:
        """Logs and shards of such ticks go."""
        for path in list(self.folder.rglob("*")):
            match = self._names.fullmatch(self._name(path).removesuffix(PART))
            tick = match and (match["log"] or match["shard"])
            if tick and useless(int(tick)) and path.is_file():
                path.unlink()
                self._known.pop(self._name(path).removesuffix(PART), None)
                self._about.digests.pop(self._name(path), None)
                if not any(path.parent.iterdir()):
                    path.parent.rmdir()


@dataclass
class _About:
    """What the files do not say themselves."""

    start_id: int = 0
    digests: dict[str, str] = field(default_factory=dict)  # sha256 of the shards that are whole


def _read_about(path: Path) -> _About:
    try:
        found = json.loads(path.read_text())
        digests = {name: digest for name, digest in found["digests"].items() if (path.parent / name).exists()}
        return _About(int(found["start_id"]), digests)
    except FileNotFoundError:
        return _About()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is passed over: it cannot be read (%s)", path, error)
        return _About()


def _sum(path: Path, end: int) -> tuple[int, int]:
    """(`end`, CRC-32 of a file's first `end` bytes), or less where the file is shorter."""
    checksum = at = 0
    with path.open("rb") as file:
        while at < end and (part := file.read(min(READ_BYTES, end - at))):
            checksum, at = crc32(part, checksum), at + len(part)
    return at, checksum


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
