"""Ships a stage's log, journal and newest shard to the anchor's volume, so that the loss of its host loses few ticks. No tick waits.

Whoever takes the place of a lost stage on another host begins with that copy (restoring.py). What is copied are files that
grow. Of each the anchor says how many bytes it has and their checksum, so a transfer goes on where it broke off, whichever
end was killed, and where the two mean different bytes it begins again. In this order:

    journal.jsonl       of stage 0, so that it never lacks a tick that the log has
    the log             from the newest base on that the anchor has whole, as far as it is on this disk
    the newest shard    with what is left of the line: once it is whole, the anchor drops what lies before it

One part is on its way at a time, and the next follows its answer: with parts of 3 MiB a line of 100 Mbit/s and 100 ms is
busy for two thirds of the time, and a report never waits long behind one.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from isal.isal_zlib import crc32

from swarm_core.run_folder import CHECKPOINTS, JOURNAL_FILE, MANIFEST_FILE, checkpoint_name, shard_name
from swarm_core.wire.messages import Copy, CopyHeld
from swarm_worker.redo import Extent, Extents, Redo

PART_BYTES = 3 << 20
READ_BYTES = 16 << 20
PAUSE_S = 30.0  # after a refusal: a full disk does not mend itself at once
log = logging.getLogger(__name__)


def keeps_copy(off_host: bool, out: Path) -> bool:
    """Whether a stage with this run folder has it copied: not where the anchor writes into the same one."""
    return off_host and not (out / MANIFEST_FILE).exists()


def plan(files: tuple[Extent, ...], whole: set[int]) -> tuple[tuple[Extent, ...], Extent | None]:
    """(the files of a log that are to be at the anchor, the one whose shard is to be); it has the `whole` shards, by tick."""
    based = [i for i, file in enumerate(files) if file.shard == "" or file.base in whole]
    first = based[-1] if based else 0
    newer = [file for file in files[first:] if file.shard and file.base not in whole]
    return files[first:], newer[-1] if newer else None


@dataclass(frozen=True)
class Wanted:
    """A file that the anchor is to have, as it lies on this disk."""

    name: str
    path: Path
    bytes: int
    tick: int = 0  # ticks that can be rebuilt once all of it is there
    digest: str = ""  # of one that will not grow
    rewritten: bool = False  # at times, without another age of the log


@dataclass
class _Shard:
    """The one under way. It is finished even if it is pruned here, or a newer one comes: else a slow line never had one."""

    tick: int
    wanted: Wanted
    opened: BinaryIO


class Copier:
    """One stage's, for the life of its process. `wake`, `held` and `resume` are called on the event loop."""

    def __init__(self, post: Callable[[Copy], None], redo: Redo, out: Path, stage: int, stages: int) -> None:
        self._post, self._redo, self._out = post, redo, out
        self._stage, self._stages = stage, stages
        self._there: dict[str, tuple[int, int]] = {}  # (bytes, CRC-32) of what the anchor has of a file
        self._whole: set[int] = set()  # ticks of the shards that it has
        self._given_up: set[int] = set()  # and of those that it would not take
        self._shard: _Shard | None = None
        self._age = -1
        self._refused = ""
        self._answer: asyncio.Future[CopyHeld | None] | None = None
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """There may be more to send."""
        self._wake.set()

    def resume(self) -> None:
        """The stream to the anchor is a new one: what was under way is lost, and what is there is asked anew."""
        self._there, self._whole = {}, set()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(None)
        self._wake.set()

    def held(self, message: CopyHeld) -> None:
        """The anchor's answer to the part that is on its way."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(message)

    async def run(self) -> None:
        """Ship until cancelled."""
        loop = asyncio.get_running_loop()
        self._redo.on_sync = lambda: loop.call_soon_threadsafe(self.wake)
        try:
            while True:
                self._wake.clear()
                try:
                    while await self._ship_one():
                        pass
                except FileNotFoundError as error:  # pruned meanwhile: the next plan is without it
                    log.info("stage %d: %s", self._stage, error)
                except OSError as error:  # of this disk; whoever trains meets it in a place of its own
                    log.warning("stage %d: its copy cannot be kept up: %s", self._stage, error)
                    await asyncio.sleep(PAUSE_S)
                await self._wake.wait()
        finally:
            self._redo.on_sync = lambda: None
            self._drop_shard()

    # One part ----------------------------------------------------------------------------------------------------------

    async def _ship_one(self) -> bool:
        """Send the next part and take its answer; False when all is there."""
        extents = self._redo.extents  # before the journal is looked at, which is written before the log
        if extents.age != self._age:  # files may have been cut, or be others of the same name
            self._age = extents.age
            self._there, self._whole = {}, set()
            self._drop_shard()
        for wanted in self._wanted(extents):
            there = self._there.get(wanted.name)
            if there is not None and wanted.rewritten and await self._differs(wanted, *there):
                there = None
            if there is None or there[0] < wanted.bytes:
                await self._send(wanted, there, extents)
                return True
        return False

    async def _differs(self, wanted: Wanted, size: int, checksum: int) -> bool:
        return size > wanted.bytes or await asyncio.to_thread(self._sum, wanted, size) != checksum

    async def _send(self, wanted: Wanted, there: tuple[int, int] | None, extents: Extents) -> None:
        if there is None:  # an empty part asks
            offset, part = wanted.bytes, b""
            before = await asyncio.to_thread(self._sum, wanted, wanted.bytes)
        else:
            offset, before = there
            part = await asyncio.to_thread(self._read, wanted, offset, min(PART_BYTES, wanted.bytes - offset))
        end, last = offset + len(part), offset + len(part) == wanted.bytes
        if self._redo.extents.age != extents.age or not extents.files:
            return  # what was read may be of neither age
        message = Copy(wanted.name, offset, before, part, wanted.digest if last else "", extents.start_id)
        message.tick, message.newest = wanted.tick if last else 0, extents.files[-1].base
        self._answer = asyncio.get_running_loop().create_future()
        self._post(message)
        answer = await self._answer
        if answer is not None and answer.file == wanted.name:
            await self._take(wanted, answer, (end, crc32(part, before)))

    async def _take(self, wanted: Wanted, answer: CopyHeld, expected: tuple[int, int]) -> None:
        there = (answer.bytes, answer.checksum)
        if answer.refused:
            await self._refuse(answer)
            return
        self._refused = ""
        if answer.whole and self._shard is not None and self._shard.wanted is wanted:
            self._whole.add(self._shard.tick)
            self._drop_shard()
        elif there == expected:
            self._there[wanted.name] = there
        else:  # where the anchor has other bytes, all of it again
            self._there[wanted.name] = (0, 0) if await self._differs(wanted, *there) else there

    async def _refuse(self, answer: CopyHeld) -> None:
        if answer.refused != self._refused:
            log.warning(
                "stage %d: the anchor does not take the copy of %s: %s", self._stage, answer.file, answer.refused
            )
        self._refused = answer.refused
        if self._shard is not None and self._shard.wanted.name == answer.file:
            self._given_up.add(self._shard.tick)  # the next one may be taken
            self._drop_shard()
            return
        await asyncio.sleep(PAUSE_S)
        self._there.pop(answer.file, None)

    # What is to be there -----------------------------------------------------------------------------------------------

    def _wanted(self, extents: Extents) -> Iterator[Wanted]:
        journal = self._out / JOURNAL_FILE
        if self._stage == 0 and journal.exists():
            yield Wanted(JOURNAL_FILE, journal, journal.stat().st_size, rewritten=True)
        files, newest = plan(extents.files, self._whole)
        for file in files:
            yield Wanted(str(file.path.relative_to(self._out)), file.path, file.bytes, file.tick)
        if self._shard is None and newest is not None and newest.base not in self._given_up:
            self._open_shard(newest)
        if self._shard is not None:
            yield self._shard.wanted

    def _open_shard(self, file: Extent) -> None:
        name = f"{CHECKPOINTS}/{checkpoint_name(file.base)}/{shard_name(self._stage, self._stages)}"
        opened = (self._out / name).open("rb")
        size = os.fstat(opened.fileno()).st_size
        self._shard = _Shard(file.base, Wanted(name, self._out / name, size, digest=file.shard), opened)

    def _drop_shard(self) -> None:
        if self._shard is not None:
            self._there.pop(self._shard.wanted.name, None)
            self._shard.opened.close()
            self._shard = None

    def _read(self, wanted: Wanted, offset: int, length: int) -> bytes:
        if self._shard is not None and self._shard.wanted is wanted:
            return os.pread(self._shard.opened.fileno(), length, offset)
        with wanted.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def _sum(self, wanted: Wanted, end: int) -> int:
        """CRC-32 of a file's first bytes."""
        checksum, at = 0, 0
        while at < end and (part := self._read(wanted, at, min(READ_BYTES, end - at))):
            checksum, at = crc32(part, checksum), at + len(part)
        return checksum
