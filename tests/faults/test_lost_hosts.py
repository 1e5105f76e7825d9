"""A stage is lost with its host: whoever takes its place with an empty folder begins with the anchor's copy, at most 10 ticks back."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swarm_core.run_folder import MOST_LOST
from swarm_worker.copying import Copier


def lost(swarm: Any) -> list[float]:
    return [row["lost_ticks"] for row in swarm.rows("event") if row["event"] == "start" and "lost_ticks" in row]


@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize(("name", "tick"), [("voting", 6), ("applied", 13)])
def test_a_stage_that_is_lost_with_its_host_costs_few_ticks_and_changes_nothing(
    name: str, tick: int, stage: int, run_file: Path, calm: Any, dies: Callable[..., None], tmp_path: Path
) -> None:
    """Before the first checkpoint, from the model and the log; behind it, from a shard that was copied, too."""
    swarm = type(calm)(run_file, tmp_path / "run", apart=True)
    dies(name, stage, tick)
    asyncio.run(swarm.run())
    assert swarm.deaths == 1
    assert len(lost(swarm)) == 1 and lost(swarm)[0] <= MOST_LOST
    assert (tmp_path / f"run-host-{stage}-1" / "redo").exists()
    swarm.check_equal(calm)


def test_ticks_that_were_not_copied_are_done_again_with_their_checkpoint(
    run_file: Path, calm: Any, dies: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The line of stage 1 to the anchor carries nothing between ticks 5 and 18: all stages go back, past a complete checkpoint."""
    ship_one = Copier._ship_one

    async def ships(copier: Copier) -> bool:
        files = copier._redo.extents.files
        stuck = copier._stage == 1 and files and 5 <= files[-1].tick < 18
        return False if stuck else await ship_one(copier)

    monkeypatch.setattr(Copier, "_ship_one", ships)
    dies("voting", 1, 11)
    dies("applied", 2, 14)  # nothing of stage 1 was copied since, but its own disk is there
    swarm = type(calm)(run_file, tmp_path / "run", apart=True)
    asyncio.run(swarm.run())
    assert swarm.deaths == 2
    first, second = lost(swarm)
    assert 6 <= first <= MOST_LOST and second <= 1
    assert len(swarm.events("copy_behind")) == 1
    made = [message for message in swarm.events("checkpoint") if "tick-00000008" in message]
    assert len(made) == 1, "the first one's row was of a future that is left"
    swarm.check_equal(calm)


def test_two_neighbours_are_lost_at_once(run_file: Path, calm: Any, dies: Callable[..., None], tmp_path: Path) -> None:
    swarm = type(calm)(run_file, tmp_path / "run", apart=True)
    dies("voting", 1, 10)
    dies("forward", 0, 11)
    dies("forward", 1, 11)
    asyncio.run(swarm.run())
    assert swarm.deaths >= 2 and all(ticks <= MOST_LOST for ticks in lost(swarm))
    swarm.check_equal(calm)


def test_where_no_log_is_left_a_run_that_was_cut_off_goes_on_from_its_checkpoint(
    run_file: Path, calm: Any, tmp_path: Path
) -> None:
    shutil.copytree(calm.out, out := tmp_path / "run")
    shutil.rmtree(out / "redo")
    state = json.loads((out / "anchor" / "state.json").read_text())
    state |= {"at_work": True, "closing": "", "finished": {}}  # as it was before the last word
    (out / "anchor" / "state.json").write_text(json.dumps(state))
    swarm = type(calm)(run_file, out)
    assert asyncio.run(swarm.run(resume=True)) == "all 20 ticks are done"
    assert len(swarm.events("from_checkpoint")) == 1
    swarm.check_equal(calm)
