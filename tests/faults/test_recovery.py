"""A stage dies at a named point and comes back with its disk: no published tick is lost, and the weights are those of a calm run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swarm_worker import failpoints, shard
from swarm_worker.failpoints import POINTS

DYING = [(name, stage) for name in POINTS for stage in range(3) if name != "decided" or stage == 0]
DYING = [
    (name, stage) for name, stage in DYING if (name, stage) != ("forward", 2)
]  # the last stage goes on to the loss


@pytest.mark.parametrize(("name", "stage"), DYING, ids=lambda v: str(v))
def test_a_stage_that_died_changes_nothing(
    name: str, stage: int, run_file: Path, calm: Any, dies: Callable[..., None], tmp_path: Path
) -> None:
    swarm = type(calm)(run_file, tmp_path / "run")
    dies(name, stage, 8 if name in ("saving", "saved") else 10)
    asyncio.run(swarm.run())
    assert swarm.deaths == 1
    assert len(swarm.events("fence")) == 1
    assert [row["lost_ticks"] for row in swarm.rows("event") if row["event"] == "start" and "lost_ticks" in row] == [0]
    swarm.check_equal(calm)


@pytest.mark.parametrize("stage", range(3))
def test_a_stage_that_dies_ticks_behind_a_checkpoint_that_is_still_being_written_writes_it_again(
    stage: int, run_file: Path, calm: Any, dies: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, deaths, write = threading.Event(), [], shard.write_shard
    dies("applied", stage, 10)
    die, slow = failpoints.hit, []

    def hit(name: str, at: int, tick: int) -> None:
        try:
            die(name, at, tick)
        except BaseException as error:
            deaths.append(error)
            dead.set()
            raise

    def write_shard(path: Path, what: shard.Shard) -> tuple[str, int]:
        if path.parent.name == "tick-00000008" and path.name.startswith(f"stage-{stage:02d}") and not slow:
            slow.append(path)
            assert dead.wait(60)
            raise deaths[0]  # what is dead writes nothing
        return write(path, what)

    monkeypatch.setattr(failpoints, "hit", hit)
    monkeypatch.setattr(shard, "write_shard", write_shard)
    swarm = type(calm)(run_file, tmp_path / "run")
    asyncio.run(swarm.run())
    assert swarm.deaths == 1 and slow
    assert [text.split(",")[0] for text in swarm.events("checkpoint")] == [f"tick-{t:08d}" for t in (8, 16, 20)]
    swarm.check_equal(calm)
