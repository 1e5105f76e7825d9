"""The copy of a stage with the anchor, and back: whatever breaks on the way, what is there is what lies here, and no more is promised."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from anchor_node import copies
from anchor_node.copies import StageCopy
from swarm_core.run_folder import MANIFEST_FILE
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import Copy, CopyHeld, CopyWanted, Decide, Outcome
from swarm_worker import copying
from swarm_worker.copying import Copier, keeps_copy, plan
from swarm_worker.headers import Position
from swarm_worker.redo import Extent, Kind, Record, Redo
from swarm_worker.schedule import Stamp

STAGE, STAGES, START = 0, 3, 77
FOLDER = f"copies/stage-{STAGE:02d}-of-{STAGES:02d}"
LOG, SHARD = f"redo/stage-{STAGE:02d}-of-{STAGES:02d}", f"stage-{STAGE:02d}-of-{STAGES:02d}.safetensors"
Version = tuple[int, int]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "PART_BYTES", 500)
    monkeypatch.setattr(copying, "READ_BYTES", 300)
    monkeypatch.setattr(copying, "PAUSE_S", 0.0)
    monkeypatch.setattr(copies, "READ_BYTES", 300)
    monkeypatch.setattr(copies, "LEAST_FREE_BYTES", 0)


class Host:
    """A stage's disk, its log, and the copy that goes over a line to an anchor. Either end may be killed."""

    def __init__(self, out: Path, anchor: Path, rng: random.Random) -> None:
        self.out, self.anchor, self.rng = out, anchor, rng
        self.breaks = 0.0
        self.redo = Redo(out, STAGE, STAGES, "digest")
        self.copy = StageCopy(anchor, STAGE, STAGES)
        self.version: Version = (0, 0)
        self.epoch = 1
        (out / "journal.jsonl").write_text("")
        self.redo.begin(START, self.version)
        self.versions = [self.version]  # that could be gone back to
        self.left: int | None = None

    # The stage -------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        stamp = Stamp(epoch=self.epoch, tick=self.version[0], lineage=self.version[1], microbatches=1)
        decide = Decide(Outcome.COMMIT, self.rng.random())
        with (self.out / "journal.jsonl").open("a") as file:
            file.write(f'{{"tick": {stamp.tick}}}\n')
        self.redo.append(Record(Kind.BATCH, self.rng.randbytes(self.rng.randrange(800))))
        self.redo.append(Record(Kind.DECIDED, stamp=stamp, decide=decide))
        self.redo.sync()
        position = Position().after(stamp, decide)
        self.version = position.tick, position.lineage
        self.versions.append(self.version)

    def save(self) -> None:
        path = self.out / "checkpoints" / f"tick-{self.version[0]:08d}" / SHARD
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data := self.rng.randbytes(self.rng.randrange(1, 4000)))
        self.redo.turn(self.version)
        self.redo.settle(self.version[0], hashlib.sha256(data).hexdigest(), keep=2)
        past = [p for p in (self.out / "checkpoints").glob(f"*/{SHARD}") if p.parent.name <= path.parent.name]
        for old in sorted(past)[:-3]:  # as shard.py prunes
            old.unlink()

    def go_back(self) -> None:
        """Another epoch begins, at a version that all hold."""
        reachable = self.redo.versions({int(p.parent.name[5:]) for p in self.out.glob(f"checkpoints/*/{SHARD}")})
        self.version = self.rng.choice(reachable[-6:])
        self.redo.cut(self.version)
        self.epoch += 1
        lines = (self.out / "journal.jsonl").read_text().splitlines(keepends=True)
        (self.out / "journal.new").write_text("".join(lines[: self.version[0]]))
        (self.out / "journal.new").rename(self.out / "journal.jsonl")

    def die(self) -> None:
        self.redo.close()
        self.redo = Redo(self.out, STAGE, STAGES, "digest")
        self.redo.find()
        self.go_back()

    # The line --------------------------------------------------------------------------------------------------------

    def post(self, message: Copy) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.killed.set()
                return
        asyncio.get_running_loop().call_soon(self._carry, message)

    def _carry(self, message: Copy) -> None:
        fate = self.rng.random()
        if fate < self.breaks / 2:
            self.copier.resume()  # it never came
            return
        answer = self.copy.take(message, START)
        if fate < self.breaks:
            self.copier.resume()  # or its answer did not
        else:
            self.copier.held(answer)

    async def ship(self, *, parts: int | None = None) -> None:
        """Until all is there; or until the stage is killed, after so many parts."""
        self.left, done = parts, asyncio.Event()

        class Watched(Copier):
            async def _ship_one(self) -> bool:
                more = await super()._ship_one()
                if not more:
                    done.set()
                return more

        self.copier, self.killed = Watched(self.post, self.redo, self.out, STAGE, STAGES), done
        task = asyncio.create_task(self.copier.run())
        await done.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def there(self, name: str) -> bytes | None:
        path = self.anchor / FOLDER / name
        return path.read_bytes() if path.exists() else None


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, timeout=60))


@pytest.mark.parametrize("seed", range(20))
def test_whatever_breaks_the_copy_can_be_begun_from(seed: int, tmp_path: Path) -> None:
    """Ticks, checkpoints, epochs that go back, deaths of either end and lost parts, in any order; then a stranger begins."""
    rng = random.Random(seed)
    host = Host(tmp_path / "stage", tmp_path / "anchor", rng) if not (tmp_path / "stage").mkdir() else None
    assert host is not None
    (tmp_path / "anchor").mkdir()

    async def work() -> None:
        for _ in range(40):
            match rng.choice(["tick", "tick", "tick", "save", "back", "die", "anchor", "ship", "ship"]):
                case "tick":
                    host.tick()
                case "save":
                    host.save()
                case "back":
                    host.go_back()
                case "die":
                    host.die()
                case "anchor":
                    host.copy = StageCopy(host.anchor, STAGE, STAGES)
                case "ship":
                    host.breaks = rng.choice([0.0, 0.3])
                    await host.ship(parts=rng.choice([None, rng.randrange(12)]))
        host.tick()
        host.breaks = 0.0
        await host.ship()

    run(work())
    assert host.there("journal.jsonl") == (host.out / "journal.jsonl").read_bytes()
    last = host.redo.extents.files[-1]
    assert host.there(str(last.path.relative_to(host.out))) == last.path.read_bytes()
    assert host.copy.tick == host.version[0]
    stranger = Redo(host.anchor / FOLDER, STAGE, STAGES, "digest")
    stranger.find()
    shards = {int(path.parent.name[5:]) for path in (host.anchor / FOLDER).glob(f"checkpoints/*/{SHARD}")}
    assert stranger.start_id == START and stranger.versions(shards)[-1] == host.version
    for tick, digest in stranger.bases(host.version):
        if digest and tick in shards:
            data = host.there(f"checkpoints/tick-{tick:08d}/{SHARD}")
            assert data is not None and hashlib.sha256(data).hexdigest() == digest
    listed = host.copy.listed()
    assert listed.start_id == START and {file.file for file in listed.files} >= {"journal.jsonl"}


def extents(*files: tuple[int, str]) -> tuple[Extent, ...]:
    return tuple(Extent(Path(f"{base}"), base, shard, 10, base) for base, shard in files)


@pytest.mark.parametrize(
    ("files", "whole", "logs", "shard"),
    [
        ([(0, "")], set(), [0], None),
        ([(0, ""), (8, "d")], set(), [0, 8], 8),
        ([(0, ""), (8, "d"), (16, "e")], {8}, [8, 16], 16),
        ([(0, ""), (8, "d"), (16, "e")], {8, 16}, [16], None),
        ([(8, "d"), (16, "e")], set(), [8, 16], 16),  # a new copy, of a log whose beginning is gone
        ([], set(), [], None),
    ],
)
def test_the_log_goes_from_the_newest_base_that_is_there_and_the_newest_shard_follows(
    files: list[tuple[int, str]], whole: set[int], logs: list[int], shard: int | None
) -> None:
    planned, newest = plan(extents(*files), whole)
    assert [file.base for file in planned] == logs
    assert (newest.base if newest else None) == shard


def test_a_stage_that_shares_the_anchors_folder_copies_nothing(tmp_path: Path) -> None:
    assert keeps_copy(True, tmp_path) and not keeps_copy(False, tmp_path)
    (tmp_path / MANIFEST_FILE).touch()
    assert not keeps_copy(True, tmp_path)


# What an anchor takes ----------------------------------------------------------------------------------------------------

NAME = f"{LOG}/tick-00000000.log"


@pytest.fixture
def kept(tmp_path: Path) -> StageCopy:
    copy = StageCopy(tmp_path, STAGE, STAGES)
    assert copy.take(Copy(NAME, 0, 0, b"abc", start_id=START), START).bytes == 3
    return copy


@pytest.mark.parametrize(
    "name",
    [
        "../state.json", "/etc/passwd", "about.json", "anchor/state.json", f"{LOG}/../tick-00000000.log",
        f"{LOG}/tick-1.log", f"{LOG}/tick-00000000.log\n", "redo/stage-01-of-03/tick-00000000.log", "", "journal.jsonl/x",
        f"checkpoints/tick-00000008/{SHARD}.part", "checkpoints/tick-00000008/COMPLETE", f"{LOG}/tick-٠٠٠٠٠٠٠٠.log",
    ],
)  # fmt: skip
def test_only_a_stages_own_files_have_names(name: str, kept: StageCopy) -> None:
    with pytest.raises(BadFrame, match="which is no file of its own that is copied"):
        kept.take(Copy(name, 0, 0, b"x", start_id=START), START)
    with pytest.raises(BadFrame):
        kept.read(CopyWanted(name, 0))
    assert kept.read(CopyWanted(f"{LOG}/tick-00000008.log", 0)).part == b"", "no such file"


def test_the_journal_is_of_stage_0_alone(tmp_path: Path) -> None:
    with pytest.raises(BadFrame):
        StageCopy(tmp_path, 1, STAGES).take(Copy("journal.jsonl", 0, 0, b"x", start_id=START), START)


def test_what_does_not_follow_on_what_is_there_is_left_out(kept: StageCopy) -> None:
    there = kept.take(Copy(NAME, 3, 12345, b"def", start_id=START), START)
    assert (there.bytes, there.refused) == (3, ""), "of another file"
    assert kept.take(Copy(NAME, 1 << 60, 0, b"def", start_id=START), START).bytes == 3, "a gap"
    assert kept.take(Copy(NAME, 3, there.checksum, b"def", start_id=START), START).bytes == 6
    assert kept.take(Copy(NAME, 0, 0, b"new", start_id=START), START).bytes == 3, "from the beginning it is another one"
    with pytest.raises(BadFrame, match="a part has"):
        kept.take(Copy(NAME, 3, 0, bytes(copies.MOST_BYTES + 1), start_id=START), START)


def test_another_start_of_the_run_is_refused_and_a_new_one_leaves_nothing(kept: StageCopy) -> None:
    assert "another start" in kept.take(Copy(NAME, 3, 0, b"d", start_id=5), START).refused
    other = f"{LOG}/tick-00000008.log"
    kept.take(Copy(other, 0, 0, b"d", start_id=5), 5)
    assert [file.file for file in kept.listed().files] == [other] and kept.start_id == 5


def test_a_shard_counts_once_its_digest_is_right(kept: StageCopy) -> None:
    name = f"checkpoints/tick-00000008/{SHARD}"
    wrong = kept.take(Copy(name, 0, 0, b"shard", "ab" * 32, START, newest=8), START)
    assert "its sha256 is" in wrong.refused and wrong.bytes == 0
    first = kept.take(Copy(name, 0, 0, b"sha", "", START, newest=8), START)
    assert name not in {file.file for file in kept.listed().files}
    digest = hashlib.sha256(b"shard").hexdigest()
    whole = kept.take(Copy(name, 3, first.checksum, b"rd", digest, START, newest=8), START)
    assert whole.whole and kept.has_shard("tick-00000008")
    assert {file.file for file in kept.listed().files} == {name}, "the log before it is of no more use"
    again = StageCopy(kept._out, STAGE, STAGES)
    assert again.take(Copy(name, 5, 0, b"", digest, START, newest=8), START).whole
    again.take(Copy(NAME, 0, 0, b"abc", start_id=START, newest=0), START)
    assert not again.has_shard("tick-00000008"), "it was of a future that the stage has left"


def test_a_disk_that_is_nearly_full_takes_nothing(kept: StageCopy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "LEAST_FREE_BYTES", 1 << 60)
    held = kept.take(Copy(NAME, 3, 0, b"def", start_id=START), START)
    assert held.refused.startswith("the anchor's disk has") and held.bytes == 3
    assert isinstance(held, CopyHeld)
