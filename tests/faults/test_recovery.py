"""A stage dies at a named point and comes back with its disk: no published tick is lost, and the weights are those of a calm run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
    dies(name, stage, 8 if name == "saved" else 10)
    asyncio.run(swarm.run())
    assert swarm.deaths == 1
    assert len(swarm.events("fence")) == 1
    assert [row["lost_ticks"] for row in swarm.rows("event") if row["event"] == "start" and "lost_ticks" in row] == [0]
    swarm.check_equal(calm)
