"""The redo log by itself: what can be reached after torn tails, turns, cuts and other starts, against a model that is a list."""

from __future__ import annotations

import os
import stat
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from swarm_core.wire.messages import Decide, Outcome
from swarm_worker import redo as redo_file
from swarm_worker.headers import Position
from swarm_worker.recovery import undecided
from swarm_worker.redo import Kind, Record, Redo
from swarm_worker.schedule import Op, Stamp

COMMIT = Decide(Outcome.COMMIT, 0.5)
START = (0, 0)
Version = tuple[int, int]


@pytest.fixture(autouse=True)
def _no_further_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few ticks are enough to see what is kept; that all of the last MOST_LOST stay has a test of its own."""
    monkeypatch.setattr(redo_file, "MOST_LOST", 0)


def stamp_at(version: Version, epoch: int = 1) -> Stamp:
    return Stamp(epoch=epoch, tick=version[0], lineage=version[1], microbatches=1)


def after(stamp: Stamp, decide: Decide) -> Version:
    position = Position().after(stamp, decide)
    return position.tick, position.lineage


def tallied(version: Version, epoch: int = 1) -> Record:
    return Record(Kind.COMPUTE, b"", Op.TALLY, stamp_at(version, epoch))


def decided(version: Version, decide: Decide = COMMIT, epoch: int = 1) -> Record:
    return Record(Kind.DECIDED, stamp=stamp_at(version, epoch), decide=decide)


def rollouts(number: int) -> Record:
    return Record(Kind.ROLLOUTS, b"tokens %d" % number, microbatch=number)


def begun(folder: Path, start: int = 7, base: Version = START, shard: str = "") -> Redo:
    redo = Redo(folder, 0, 3, "digest")
    redo.begin(start, base, shard)
    return redo


def tick(redo: Redo, version: Version, decide: Decide = COMMIT, epoch: int = 1) -> Version:
    """Everything of one tick; the version that it leads to."""
    for op in (Op.FORWARD, Op.BACKWARD):
        redo.append(Record(Kind.COMPUTE, b"packet", op, stamp_at(version, epoch)))
    redo.append(tallied(version, epoch))
    redo.append(decided(version, decide, epoch))
    return after(stamp_at(version, epoch), decide)


def saved(redo: Redo, version: Version, shard: str = "shard", keep: int = 2) -> None:
    """A checkpoint: the log goes on in a new file, and hears later that the shard is on disk."""
    redo.turn(version)
    redo.settle(version[0], shard, keep)


def ticks(redo: Redo, count: int, version: Version = START, epoch: int = 1) -> list[Version]:
    """The versions from `version` on, after `count` ticks."""
    found = [version]
    for i in range(count):
        found.append(tick(redo, found[-1], Decide(Outcome.COMMIT, 1.0 + i), epoch))
    return found


def found_again(redo: Redo, folder: Path, stage: int = 0, digest: str = "digest") -> Redo:
    """What another process finds."""
    redo.close()
    other = Redo(folder, stage, 3, digest)
    other.find()
    return other


# Torn and damaged ------------------------------------------------------------------------------------------------------


@dataclass
class Written:
    """A small log, and what each of its bytes means."""

    path: Path
    data: bytes
    versions: list[Version]
    ends: list[int]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    redo = begun(tmp_path)
    versions = ticks(redo, 3)
    redo.append(tallied(versions[-1]))
    redo.close()
    segment = redo._segments[0]
    return Written(segment.path, segment.path.read_bytes(), versions, segment.ends)


def test_a_log_torn_at_any_byte_goes_back_to_the_last_whole_decision_and_goes_on_from_there(
    written: Written, tmp_path: Path
) -> None:
    for length in range(len(written.data)):
        written.path.write_bytes(written.data[:length])
        redo = Redo(tmp_path, 0, 3, "digest")
        redo.find()
        whole = [v for v, end in zip(written.versions, written.ends, strict=True) if end <= length]
        assert redo.versions(set()) == whole
        if not whole:
            continue
        redo.cut(whole[-1])
        longer = tick(redo, whole[-1], epoch=2)
        redo.sync()
        assert found_again(redo, tmp_path).versions(set()) == [*whole, longer]


def test_a_byte_that_has_changed_ends_the_log_and_nothing_raises(written: Written, tmp_path: Path) -> None:
    for place in range(len(written.data)):
        damaged = bytearray(written.data)
        damaged[place] ^= 0x55
        written.path.write_bytes(damaged)
        redo = Redo(tmp_path, 0, 3, "digest")
        redo.find()
        whole = [v for v, end in zip(written.versions, written.ends, strict=True) if end <= place]
        assert redo.versions(set()) == whole
        assert redo.voted is None or redo.voted == stamp_at(whole[-1])


def test_who_has_voted_can_reach_either_outcome_and_nobody_else_can(tmp_path: Path) -> None:
    redo = begun(tmp_path)
    newest = ticks(redo, 2)[-1]
    assert redo.voted is None and undecided(redo.voted) == []
    redo.append(Record(Kind.COMPUTE, b"", Op.BACKWARD, stamp_at(newest)))
    assert redo.voted is None
    redo.append(tallied(newest))
    redo.sync()
    again = found_again(redo, tmp_path)
    reach = [after(stamp_at(newest), Decide(outcome))[1] for outcome in (Outcome.COMMIT, Outcome.SKIP)]
    assert again.voted == stamp_at(newest) and undecided(again.voted) == reach and len(set(reach)) == 2


# Files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "files"), [(1, 2), (2, 3), (0, 5)])
def test_a_turn_keeps_the_files_of_the_checkpoints_that_are_kept_and_of_one_more(
    keep: int, files: int, tmp_path: Path
) -> None:
    redo, versions = begun(tmp_path), [START]
    for number in range(4):
        versions += ticks(redo, 2, versions[-1])[1:]
        saved(redo, versions[-1], f"shard {number}", keep)
    bases = versions[::2][-files:]
    assert [path.name for path in sorted(redo.folder.iterdir())] == [f"tick-{v[0]:08d}.log" for v in bases]
    shards = {v[0] for v in bases}
    for log in (redo, found_again(redo, tmp_path)):
        assert log.versions(shards) == [v for v in versions if v >= bases[0]]
        assert [base for base, _ in log.bases(versions[-1])] == [v[0] for v in reversed(bases)]


def test_a_version_whose_shard_is_not_written_yet_is_reached_from_the_base_before_it(tmp_path: Path) -> None:
    redo = begun(tmp_path)
    first = ticks(redo, 2)
    saved(redo, first[-1], "first", 1)
    second = ticks(redo, 2, first[-1])
    redo.turn(second[-1])
    third = ticks(redo, 2, second[-1])
    redo.sync()
    for log in (redo, found_again(redo, tmp_path)):
        assert log.bases(third[-1]) == [(2, "first"), (0, "")] and not log.has_shard(second[-1])
        assert log.versions({2, 4}) == [*first[:-1], *second[:-1], *third]
        assert len([r for r in log.records(2, third[-1]) if r.kind is Kind.DECIDED]) == 4
    other = found_again(redo, tmp_path)
    other.cut(third[-1])
    other.settle(4, "second", 1)
    for log in (other, found_again(other, tmp_path)):
        assert log.bases(third[-1]) == [(4, "second"), (2, "first")] and log.has_shard(second[-1])
        assert log.versions({2, 4}) == [first[-1], *second[1:-1], *third]


def test_the_word_of_a_shard_outlives_a_cut_behind_its_version(tmp_path: Path) -> None:
    redo = begun(tmp_path)
    versions = ticks(redo, 2)
    redo.turn(versions[-1])
    versions += ticks(redo, 2, versions[-1])[1:]
    redo.settle(2, "shard", 2)
    redo.cut(versions[3])
    assert found_again(redo, tmp_path).bases(versions[3]) == [(2, "shard"), (0, "")]
    redo = found_again(redo, tmp_path)
    redo.cut(versions[1])
    assert found_again(redo, tmp_path).bases(versions[1]) == [(0, "")]


def test_a_version_that_a_file_begins_with_already_is_no_reason_for_another(tmp_path: Path) -> None:
    redo = begun(tmp_path)
    version = ticks(redo, 1)[-1]
    saved(redo, version, "shard", 1)
    saved(redo, version, "shard", 1)
    assert len(list(redo.folder.iterdir())) == 2 and redo.versions({1}) == [START, version]


def test_where_shards_are_missing_what_leads_through_is_still_reached_and_nothing_else(tmp_path: Path) -> None:
    redo, versions = begun(tmp_path, shard="shard at 0"), [START]
    for number in range(3):
        versions += ticks(redo, 2, versions[-1])[1:]
        saved(redo, versions[-1], f"shard {number}", 0)
    versions += ticks(redo, 1, versions[-1])[1:]
    assert redo.versions({0}) == versions, "every later file begins where the one before it ends"
    assert redo.versions({4}) == versions[4:]
    assert redo.versions({6}) == versions[6:]
    assert redo.versions(set()) == []
    (redo.folder / "tick-00000002.log").unlink()
    again = found_again(redo, tmp_path)
    assert again.versions({0, 6}) == [*versions[:3], *versions[6:]]
    assert again.versions({0}) == versions[:3]


def test_what_is_of_another_manifest_stage_or_start_is_passed_over(tmp_path: Path) -> None:
    redo = begun(tmp_path, start=7)
    ticks(redo, 2)
    redo.sync()
    assert found_again(redo, tmp_path, digest="another").versions(set()) == []
    assert found_again(redo, tmp_path, stage=1).versions(set()) == []
    assert found_again(redo, tmp_path).start_id == 7
    (redo.folder / "tick-00000009.log").write_bytes(b"no log at all")
    assert len(found_again(redo, tmp_path).versions(set())) == 3
    other = begun(tmp_path / "other", start=8, base=(2, 5), shard="shard")
    other.close()
    os.rename(other.folder / "tick-00000002.log", redo.folder / "tick-00000002.log")
    again = found_again(redo, tmp_path)
    assert (again.start_id, again.versions({2})) == (8, [(2, 5)]), "the newest file says which start it is"


def test_a_new_start_leaves_nothing_of_the_last_one(tmp_path: Path) -> None:
    redo = begun(tmp_path, start=7)
    newest = ticks(redo, 2)[-1]
    redo.append(rollouts(0))
    saved(redo, newest, "shard", 2)
    redo.begin(8, newest, "shard")
    for log in (redo, found_again(redo, tmp_path)):
        assert (log.start_id, log.versions({2}), log.voted, log.decided) == (8, [newest], None, None)
    assert [path.name for path in redo.folder.iterdir()] == ["tick-00000002.log"]
    assert not list(redo.records(2, newest))


def test_what_a_killed_process_had_not_synced_is_on_disk_before_anybody_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    redo = begun(tmp_path)
    ticks(redo, 2)
    redo.close()  # handed to the kernel, and no more
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    found_again(redo, tmp_path)
    assert synced == [path.stat().st_ino for path in (redo.folder / "tick-00000000.log", redo.folder)]


# Rollouts --------------------------------------------------------------------------------------------------------------


def test_rollouts_that_wait_are_carried_into_a_new_file_each_until_its_batch_begins(tmp_path: Path) -> None:
    redo = begun(tmp_path)
    for number in (4, 5):  # behind a cut there can be two: one that waited, and one of a future that was left
        redo.append(rollouts(number))
    redo.append(Record(Kind.BATCH, microbatch=4))
    first = tick(redo, START)
    saved(redo, first, "shard", 1)
    redo.append(Record(Kind.BATCH, microbatch=5))
    second = tick(redo, first)
    saved(redo, second, "another", 1)
    again = found_again(redo, tmp_path)
    kinds = [(record.kind, record.microbatch) for record in again.records(1, second)][:2]
    assert kinds == [(Kind.ROLLOUTS, 5), (Kind.BATCH, 5)]
    assert not [record for record in again.records(2, after(stamp_at(second), COMMIT)) if record.kind is Kind.ROLLOUTS]


def test_a_cut_gives_back_the_rollouts_behind_it_in_order_from_all_files(tmp_path: Path) -> None:
    redo = begun(tmp_path)
    redo.append(rollouts(1))
    versions = ticks(redo, 1)
    redo.append(rollouts(2))
    versions += ticks(redo, 1, versions[-1])[1:]
    redo.append(Record(Kind.BATCH, microbatch=2))
    saved(redo, versions[-1], "shard", 2)
    redo.append(rollouts(3))
    assert [record.microbatch for record in redo.cut(versions[1])] == [2, 1, 3], "1 waits, so it was carried along"
    assert [record.microbatch for record in redo.records(0, (9, 9)) if record.kind is Kind.ROLLOUTS] == [1]


# Cuts ------------------------------------------------------------------------------------------------------------------


def test_behind_a_cut_lies_another_future(tmp_path: Path) -> None:
    redo = begun(tmp_path)
    old = ticks(redo, 2)
    saved(redo, old[-1], "shard", 2)
    old += ticks(redo, 2, old[-1])[1:]
    redo.append(tallied(old[-1]))
    assert redo.cut(old[1]) == []
    assert (redo.voted, redo.versions({2})) == (None, old[:2])
    new = ticks(redo, 2, old[1], epoch=2)[1:]
    assert not {*new} & {*old}
    for log in (redo, found_again(redo, tmp_path)):
        assert log.versions({2}) == [*old[:2], *new], "the file of the other future does not come back with its shard"


def test_a_cut_at_a_version_that_was_voted_on_keeps_the_vote(tmp_path: Path) -> None:
    redo = begun(tmp_path)
    newest = ticks(redo, 1)[-1]
    redo.append(tallied(newest))
    pending = after(stamp_at(newest), COMMIT)
    assert redo.cut(pending) == [] and redo.voted == stamp_at(newest)
    redo.append(decided(newest))
    redo.sync()
    assert redo.versions(set())[-1] == pending and redo.voted is None
    assert [record.kind for record in redo.records(0, pending)][-2:] == [Kind.COMPUTE, Kind.DECIDED]


def test_what_led_to_the_newest_version_is_known_also_behind_a_cut_and_at_the_beginning_of_a_file(
    tmp_path: Path,
) -> None:
    redo = begun(tmp_path)
    assert redo.decided is None
    versions = ticks(redo, 3)  # coefficients 1, 2, 3
    assert redo.decided == Decide(Outcome.COMMIT, 3.0)
    saved(redo, versions[-1], "shard", 1)
    assert redo.decided == Decide(Outcome.COMMIT, 3.0)
    assert found_again(redo, tmp_path).decided == Decide(Outcome.COMMIT, 3.0)
    redo.cut(versions[1])
    assert redo.decided == Decide(Outcome.COMMIT, 1.0), "not what led to the one that was cut off"
    assert found_again(redo, tmp_path).decided == Decide(Outcome.COMMIT, 1.0)
    redo.cut(START)
    assert redo.decided is None


def test_files_of_another_future_are_gone_for_good_before_anything_is_written_behind_the_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    redo = begun(tmp_path)
    versions = ticks(redo, 2)
    saved(redo, versions[-1], "shard", 2)
    synced: list[set[str]] = []

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            synced.append({entry.name for entry in os.scandir(descriptor)})

    monkeypatch.setattr(os, "fsync", fsync)
    redo.cut(versions[1])
    assert synced[-1:] == [{"tick-00000000.log"}]


# Any sequence, against a list ------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """A record, where it lies, and the version that it leads to."""

    record: Record
    file: int
    end: int
    version: Version | None = None


class RedoAgainstAList(RuleBasedStateMachine):
    """One stage 0: what it was given is a list; what the log says must follow from it."""

    @initialize(shard=st.sampled_from(["", "a shard"]))
    def begin(self, shard: str) -> None:
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name)
        self.redo = begun(self.folder, shard=shard)
        self.entries: list[Entry] = []
        self.files: list[tuple[Version, str | None]] = [(START, shard)]  # all ever; the log has the last ones
        self.first = 0  # of the files that are still there
        self.synced = self.redo._segments[0].bytes
        self.epoch, self.batches = 1, 0

    def teardown(self) -> None:
        self.redo.close()
        self.temporary.cleanup()

    # What the list says

    @property
    def versions(self) -> list[Version]:
        return [START, *(entry.version for entry in self.entries if entry.version is not None)]

    @property
    def voted(self) -> bool:
        return bool(self.entries) and self.entries[-1].record.op is Op.TALLY

    def stock(self, until: int | None = None) -> list[int]:
        waiting: list[int] = []
        for entry in self.entries[:until]:
            number = entry.record.microbatch
            if entry.record.kind is Kind.ROLLOUTS and number not in waiting:
                waiting.append(number)
            elif entry.record.kind is Kind.BATCH:
                waiting.remove(number)
        return waiting

    def place(self, version: Version) -> int:
        """How many entries lead to a version."""
        ends = (i + 1 for i, entry in enumerate(self.entries) if entry.version == version)
        return 0 if version == START else next(ends)

    def add(self, record: Record) -> None:
        self.redo.append(record)
        version = after(record.stamp, record.decide) if record.decide is not None and record.stamp else None
        self.entries.append(Entry(record, len(self.files) - 1, self.redo._segments[-1].bytes, version))

    # What happens

    @precondition(lambda self: not self.voted)
    @rule(packet=st.binary(max_size=20))
    def computes(self, packet: bytes) -> None:
        self.add(Record(Kind.COMPUTE, packet, Op.FORWARD, stamp_at(self.versions[-1], self.epoch)))

    @precondition(lambda self: not self.voted)
    @rule()
    def delivers(self) -> None:
        self.batches += 1
        self.add(rollouts(self.batches))

    @precondition(lambda self: self.stock() and not self.voted)
    @rule()
    def begins_a_batch(self) -> None:
        self.add(Record(Kind.BATCH, microbatch=self.stock()[0]))

    @precondition(lambda self: not self.voted)
    @rule()
    def votes(self) -> None:
        self.add(tallied(self.versions[-1], self.epoch))
        self.redo.sync()
        self.synced = self.entries[-1].end

    @precondition(lambda self: self.voted)
    @rule(outcome=st.sampled_from([Outcome.COMMIT, Outcome.SKIP]), coefficient=st.floats(0, 1))
    def decides(self, outcome: Outcome, coefficient: float) -> None:
        record = decided(self.versions[-1], Decide(outcome, coefficient), self.epoch)
        self.add(replace(record, zero={"tick": len(self.versions)}, row=b"row"))

    @precondition(lambda self: self.entries and self.entries[-1].version is not None)
    @rule()
    def turns(self) -> None:
        if self.files[-1][1] is None and self.files[-1][0] != self.versions[-1]:
            return  # the next checkpoint waits until this one is written
        self.redo.turn(self.versions[-1])
        if self.files[-1][0] == self.versions[-1]:
            return  # it is in a file of its own already
        self.files.append((self.versions[-1], None))
        self.synced = self.redo._segments[-1].bytes

    @precondition(lambda self: self.files[-1][1] is None)
    @rule(keep=st.integers(0, 2))
    def is_on_disk(self, keep: int) -> None:
        """What was decided before."""
        base, _ = self.files[-1]
        self.files[-1] = base, f"shard of {base[0]}"
        self.redo.settle(base[0], f"shard of {base[0]}", keep)
        self.synced = self.redo._segments[-1].bytes
        bases = [number for number, (_, shard) in enumerate(self.files) if shard is not None]
        if keep:
            self.first = max(self.first, bases[-(keep + 1) :][0])

    @rule(share=st.floats(0, 1))
    def dies(self, share: float) -> None:
        """And comes back with what was synced, and a part of the rest."""
        self.redo.close()
        path = self.redo._segments[-1].path
        size = self.synced + int(share * (path.stat().st_size - self.synced))
        os.truncate(path, size)
        last = len(self.files) - 1
        self.entries = [entry for entry in self.entries if entry.file < last or entry.end <= size]
        self.redo = found_again(self.redo, self.folder)
        self.goes_back_to(self.versions[-1])

    @rule(data=st.data(), again=st.booleans())
    def begins_another_epoch(self, data: Any, again: bool) -> None:
        """At any version that can be reached, with what is left of rollouts, as Epochs does it."""
        reached = [v for v in self.versions if v[0] >= self.files[self.first][0][0]]
        version = data.draw(st.sampled_from(reached[-3:]))
        if again:
            self.redo.sync()
            self.redo = found_again(self.redo, self.folder)
        self.goes_back_to(version)

    def goes_back_to(self, version: Version) -> None:
        waiting, at = self.stock(self.place(version)), self.place(version)
        left = [record.microbatch for record in self.redo.cut(version)]
        behind = [e.record.microbatch for e in self.entries[at:] if e.record.kind is Kind.ROLLOUTS]
        assert set(behind) <= set(left) <= set(behind) | set(waiting)
        del self.entries[at:]
        while self.files[-1][0][0] > version[0]:
            self.files.pop()
        self.epoch += 1
        for number in dict.fromkeys([*waiting, *left]):
            self.add(rollouts(number))
        self.redo.sync()
        self.synced = self.redo._segments[-1].bytes

    # What must hold

    @invariant()
    def says_what_the_list_says(self) -> None:
        shards = {base[0] for base, _ in self.files}
        self.redo.sync()  # to read it; what is sure to be there after a death is counted apart
        reached = [v for v in self.versions if v[0] >= self.files[self.first][0][0]]
        assert self.redo.versions(shards) == reached
        assert (self.redo.voted is not None) == self.voted
        if len(reached) > 1:
            led = self.entries[self.place(reached[-1]) - 1].record.decide
            assert self.redo.decided == led

    @invariant()
    def does_the_same_again(self) -> None:
        self.redo.sync()
        version = self.versions[-1]
        bases = [(base[0], shard) for base, shard in self.files[self.first :] if shard is not None]
        assert self.redo.bases(version) == bases[::-1]
        for tick_, shard in self.redo.bases(version):
            base = next(v for v in self.versions if v[0] == tick_)
            assert (base, shard) in self.files
            wanted = [e.record for e in self.entries[self.place(base) : self.place(version)]]
            again, waiting = [], set()
            for record in self.redo.records(tick_, version):
                if record.kind is Kind.ROLLOUTS:
                    waiting.add(record.microbatch)
                    continue
                if record.kind is Kind.BATCH:
                    waiting.remove(record.microbatch)
                again.append(record)
            assert again == [record for record in wanted if record.kind is not Kind.ROLLOUTS]


TestRedoAgainstAList = RedoAgainstAList.TestCase
TestRedoAgainstAList.settings = settings(max_examples=25, stateful_step_count=25, deadline=None, derandomize=True)


def test_every_stage_can_go_back_as_far_as_a_copy_may_be_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With checkpoints every two ticks, of which two are kept."""
    monkeypatch.setattr(redo_file, "MOST_LOST", 10)
    redo, version = begun(tmp_path), START
    for done in range(1, 31):
        version = tick(redo, version)
        if done % 2 == 0:
            redo.turn(version)
            redo.settle(done, f"shard {done}", 2)
        first = redo.extents.files[0].base
        assert first <= max(0, done - 10) and first >= done - 13
