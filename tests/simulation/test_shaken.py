"""Random bad days of a whole swarm (shaken_swarm.py has them), then calm: the run must end, with the weights of a run that
nothing has disturbed. And that bugs like those of the protocol's checker, and those that we had, do not get through.

Seeds are fixed; KEDGE_SEED=5000 takes those from there on, KEDGE_SEEDS=2000 so many (`make test-faults`). A failure names its seed: `shake(seed, folder)` runs it again.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shaken_swarm import ShakenSwarm, shake

from anchor_node.memory import Memory
from anchor_node.roster import Roster
from swarm_core.wire.messages import Decide, Hello, Outcome
from swarm_worker.admission import Admission
from swarm_worker.compute_thread import ComputeThread
from swarm_worker.redo import Redo
from swarm_worker.saving import Saving
from swarm_worker.schedule import Compute, Op, Schedule
from swarm_worker.service import StageService
from swarm_worker.turns import Turns

FIRST = int(os.environ.get("KEDGE_SEED", "0"))
SEEDS, PARTS = int(os.environ.get("KEDGE_SEEDS", "200")), 4
Monkey = pytest.MonkeyPatch
Caught = Callable[..., str]


@pytest.mark.parametrize("part", range(PARTS))
def test_whatever_happens_no_tick_is_lost_or_half_applied_and_the_run_goes_on(part: int, tmp_path: Path) -> None:
    happened: Counter[str] = Counter()
    for seed in range(FIRST + part, FIRST + SEEDS, PARTS):
        swarm = shake(seed, tmp_path / str(seed))
        assert not swarm.judge.trouble, f"seed {seed}, {swarm.plan}: {swarm.judge.trouble}"
        happened.update(swarm.judge.happened)
    wanted = {"epochs": 80, "stages killed": 40, "anchors killed": 15, "samplers killed": 15, "power cuts": 30}
    wanted |= {"frozen": 15, "partitions": 15, "lost": 200, "said twice": 300, "died at sync": 10}
    wanted |= {"waited for the disk": 20, "written again": 10}
    assert {name: happened[name] for name, least in wanted.items() if happened[name] < least} == {}, "too calm a day"


def test_hosts_that_are_lost_cost_what_their_copies_are_behind_and_the_run_goes_on(tmp_path: Path) -> None:
    happened: Counter[str] = Counter()
    for seed in range(FIRST, FIRST + SEEDS // 4):
        swarm = shake(seed, tmp_path / str(seed), apart=True)
        assert not swarm.judge.trouble, f"seed {seed}, {swarm.plan}: {swarm.judge.trouble}"
        happened.update(swarm.judge.happened)
    assert happened["hosts lost"] >= 15 and happened["went back"] >= 1, happened


def test_a_seed_is_always_the_same_run(tmp_path: Path) -> None:
    first, second = (shake(4, tmp_path / name) for name in ("one", "two"))
    assert first.judge.happened == second.judge.happened and first.loop.now == second.loop.now
    assert first.judge.decisions == second.judge.decisions


# A simulation that catches nothing proves nothing -----------------------------------------------------------------------


@pytest.fixture
def caught(tmp_path: Path) -> Iterator[Caught]:
    """caught(mutate, budget, **changes of the plan) -> the objection to the first run that goes wrong, or nothing."""

    def search(mutate: Callable[[Monkey], None], budget: int = 60, **changes: Any) -> str:
        for seed in range(1, budget + 1):
            swarm: ShakenSwarm = shake(seed, tmp_path / str(seed), mutate, **changes)
            if swarm.judge.trouble:
                return swarm.judge.trouble
        return ""

    yield search


def naive(monkey: Monkey) -> None:
    """A stage steps as soon as it has tallied."""
    original = Schedule._next

    def eager(self: Schedule, r: Any) -> Compute | None:
        if r.tallied and r.decide is None:
            return Compute(Op.APPLY, r.stamp, decide=Decide(Outcome.COMMIT, 1.0))
        return original(self, r)

    monkey.setattr(Schedule, "_next", eager)


def dup_start(monkey: Monkey) -> None:
    """Every START is begun, also one of an epoch that this process has worked in."""

    def start(self: Turns, epoch: int, recovery: bool) -> bool:
        self.epoch = self.began = epoch
        return True

    monkey.setattr(Turns, "start", start)


def epoch_forgotten(monkey: Monkey) -> None:
    """FENCE goes out before the number of the next epoch is on disk: an anchor that comes back gives it out again."""
    original = Memory.save

    def save(self: Memory, out: Path, *, sync: bool = False) -> None:
        epoch, self.epoch = self.epoch, 1
        original(self, out, sync=sync)
        self.epoch = epoch

    monkey.setattr(Memory, "save", save)
    # And it takes everybody back who is at work, wherever.
    join = Roster.join
    monkey.setattr(Roster, "join", lambda self, hello: join(self, _of_epoch(hello, self.epoch)))


def _of_epoch(hello: Hello, epoch: int) -> Hello:
    hello.epoch = epoch
    return hello


def no_fence(monkey: Monkey) -> None:
    """Links and frames of an epoch that is over are taken."""
    original = StageService._greet

    async def greet(self: StageService, stream: Any) -> Hello:
        return _of_epoch(await original(self, stream), self._epoch)

    monkey.setattr(StageService, "_greet", greet)
    monkey.setattr(Admission, "check", lambda self, header: None)


def log_gc(monkey: Monkey) -> None:
    """Only the newest checkpoint and what came behind it is kept."""
    original = Redo.settle

    def settle(self: Redo, tick: int, shard: str, keep: int) -> None:
        original(self, tick, shard, keep)
        self.sync()
        for old in self._segments[:-1]:
            old.path.unlink(missing_ok=True)
        self._segments = self._segments[-1:]

    monkey.setattr(Redo, "settle", settle)


def base_too_early(monkey: Monkey) -> None:
    """A version counts as a base as soon as its checkpoint is decided, and what is older goes."""
    original = Redo.turn

    def turn(self: Redo, base: tuple[int, int]) -> None:
        original(self, base)
        self.settle(base[0], "not written yet", 1)
        self.sync()

    monkey.setattr(Redo, "turn", turn)


def said_too_early(monkey: Monkey) -> None:
    """The anchor hears of a shard, and removes older ones, before the log has noted that it is there."""

    async def write(self: Saving, tick: int, copy: Any) -> None:
        loop = asyncio.get_running_loop()
        saved = await loop.run_in_executor(self._thread, self.shards.write, tick, copy)
        self.said(saved)
        await asyncio.sleep(1.0)
        await loop.run_in_executor(self._log_thread, self._redo.settle, tick, saved.digest, self.shards.keep)

    monkey.setattr(Saving, "_write", write)


def no_sync(monkey: Monkey) -> None:
    """The log is handed to the kernel before a vote, and no more."""
    original = ComputeThread._do

    def do(self: ComputeThread, command: Compute, stage_zero: Any) -> Any:
        with pytest.MonkeyPatch.context() as meanwhile:
            if command.op is Op.TALLY:
                meanwhile.setattr(self.redo, "sync", lambda: self.redo._file.flush())
            return original(self, command, stage_zero)

    monkey.setattr(ComputeThread, "_do", do)


def fence_heard_once(monkey: Monkey) -> None:
    """A FENCE that is said again on a new stream is not answered again (the swarm stood still)."""
    original = Turns.fence
    monkey.setattr(Turns, "fence", lambda self, epoch: epoch > self.epoch and original(self, epoch))


@pytest.mark.parametrize(
    ("bug", "objection", "changes"),
    [
        (naive, "which stage 0 has not decided so", {}),
        (dup_start, "for a second time", {}),
        (epoch_forgotten, "for a second time|no progress|two histories", {}),
        (no_fence, "a link of epoch", {"stages": 4, "rate": 0.3, "speed": (0.02, 0.3, 1.0, 1.0), "slow_disk": 1.0}),
        (log_gc, "damaged|is lost|holds nothing|holds ticks", {"every": 1}),
        (base_too_early, "cannot be rebuilt|is lost|holds nothing|holds ticks", {"every": 1, "slow_disk": 100.0}),
        (said_too_early, "damaged|is lost|holds nothing|holds ticks|cannot be rebuilt", {"every": 1, "keep": 1}),
        (no_sync, "is lost, though it was told", {"power": 1.0}),
        (fence_heard_once, "no progress", {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bug_is_caught(
    bug: Callable[[Monkey], None], objection: str, changes: dict[str, Any], caught: Caught
) -> None:
    found = caught(bug, **changes)
    assert found and pytest.raises(AssertionError, match=objection).matches(AssertionError(found)), found
