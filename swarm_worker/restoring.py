"""What a stage that takes the place of a lost one fetches from the anchor: the copy of its log, shard and journal.

It happens before the stage says READY, so that from then on nothing differs from a stage that was started again with its
own folder. Files come into OUT/restore first, part by part; a fetch that was broken off, by either end, goes on there.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from pathlib import Path
from typing import TypeVar

from isal.isal_zlib import crc32

from swarm_core.durable import sync
from swarm_core.run_folder import JOURNAL_FILE, REDO, copied_files, stage_name
from swarm_core.wire.errors import BadFrame, PeerLost, Unreachable
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.messages import Copies, Copy, CopyHeld, CopyWanted, FrameKind, from_bytes, to_bytes
from swarm_worker.membership import Membership, rejoin

FOLDER = "restore"
READ_BYTES = 16 << 20
SAY_S = 5.0  # between two lines of progress
SOURCE_AWAY_S = 600.0  # for an anchor that dies in the middle to be started again
log = logging.getLogger(__name__)
M = TypeVar("M")


class _Ended(Exception):
    """The run is over: nothing is fetched any more."""


class Restoring:
    """One stage's fetch, in one process."""

    def __init__(self, membership: Membership, out: Path, stage: int) -> None:
        self._membership, self._out, self._stage = membership, out, stage
        stages = membership.manifest.stages
        self._staging = out / FOLDER / stage_name(stage, stages)
        self._log = out / REDO / stage_name(stage, stages)
        self._said_at = time.monotonic()

    async def run(self, has: Copies) -> bool:
        """Fetch and put in place what the anchor has for a stage that `has` a log of its own, or none.

        False when there is nothing. Survives the death of the anchor. Raises PeerLost when it stays away.
        """
        if self._staging.exists():
            has = Copies()  # an earlier process got as far as this, and perhaps began to put it in place
        while True:
            try:
                listed = await self._ask(has, FrameKind.COPIES, Copies)
                if not listed.files:
                    shutil.rmtree(self._staging, ignore_errors=True)
                    return False
                await self._fetch(listed)
            except _Ended:
                return False
            except PeerLost as error:
                await self._source_lost(error)
                continue
            await asyncio.to_thread(self._put_in_place, [file.file for file in listed.files])
            return True

    async def _source_lost(self, error: PeerLost) -> None:
        log.warning("stage %d: %s; the fetch goes on when the anchor is back", self._stage, error)
        await self._membership.anchor.close()
        try:
            await rejoin(self._membership, SOURCE_AWAY_S)
        except Unreachable:
            raise PeerLost(
                f"the anchor was lost in the middle of fetching stage {self._stage} and did not come back within "
                f"{SOURCE_AWAY_S:.0f} s: start this worker again with the same --out, and the fetch goes on"
            ) from error

    # Fetching ----------------------------------------------------------------------------------------------------------

    async def _fetch(self, listed: Copies) -> None:
        check_listed(listed, self._stage, self._membership.manifest.stages)
        size = sum(file.bytes for file in listed.files)
        log.info("stage %d: fetching %.1f MB of its state from the anchor", self._stage, size / 1e6)
        done = 0
        for file in listed.files:
            await self._fetch_file(file, done, size)
            done += file.bytes

    async def _fetch_file(self, file: CopyHeld, done: int, size: int) -> None:
        path = self._staging / file.file
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as to:
            if to.tell() > file.bytes:
                to.truncate(0)
            at = to.seek(0, 2)
            while at < file.bytes:
                part = await self._ask(CopyWanted(file.file, at), FrameKind.COPY, Copy)
                if (part.file, part.offset) != (file.file, at) or not part.part or at + len(part.part) > file.bytes:
                    raise BadFrame(
                        f"the anchor sent {part.file[:99]!r} from byte {part.offset}, wanted {file.file} from {at}"
                    )
                to.write(part.part)
                at += len(part.part)
                self._say(done + at, size)
        if await asyncio.to_thread(_sum, path) != file.checksum:
            path.unlink()
            raise PeerLost(f"{file.file} came damaged, and is fetched again")

    async def _ask(self, message: Copies | CopyWanted, kind: FrameKind, answer: type[M]) -> M:
        ask = FrameKind.COPIES if kind is FrameKind.COPIES else FrameKind.COPY_WANTED
        await self._membership.anchor.send(Frame(Header(ask, self._membership.run), to_bytes(message)))
        while (frame := await self._membership.anchor.receive()) is not None:
            if frame.header.kind is kind:
                return from_bytes(answer, frame.payload)
            self._membership.early.append(frame)
            if frame.header.kind is FrameKind.STOP:
                raise _Ended
        raise PeerLost("the anchor closed the stream in the middle of a fetch")

    def _say(self, done: int, size: int) -> None:
        if time.monotonic() - self._said_at > SAY_S:
            self._said_at = time.monotonic()
            log.info("stage %d: %.0f of %.0f MB have come", self._stage, done / 1e6, size / 1e6)

    # Putting in place --------------------------------------------------------------------------------------------------

    def _put_in_place(self, names: list[str]) -> None:
        """What lies here of another start goes. Killed in the middle, this is done again."""
        wanted = {self._out / name for name in names}
        for path in self._log.glob("tick-*.log"):
            if path not in wanted:
                path.unlink()
        journal, before = self._out / JOURNAL_FILE, self._out / f"{JOURNAL_FILE}.before"
        if JOURNAL_FILE in names and journal.exists() and not before.exists():
            journal.replace(before)
        for name in names:
            (self._out / name).parent.mkdir(parents=True, exist_ok=True)
            sync(self._staging / name)
            (self._staging / name).replace(self._out / name)
            for folder in (self._out / name).parents:  # a power cut must not take a name that this stage will count on
                sync(folder)
                if folder == self._out:
                    break
        shutil.rmtree(self._staging)
        log.info("stage %d: its state is here", self._stage)


def check_listed(listed: Copies, stage: int, stages: int) -> None:
    """Only a stage's own files are fetched, whatever is listed. Raises BadFrame."""
    names = copied_files(stage, stages)
    for file in listed.files:
        if names.fullmatch(file.file) is None:
            raise BadFrame(f"the anchor lists {file.file[:99]!r}, which is no file of stage {stage}")


def _sum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            checksum = crc32(part, checksum)
    return checksum
