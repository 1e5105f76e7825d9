"""A stage is lost with its host: whoever takes its place with an empty folder begins with the anchor's copy, at most 10 ticks back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anchor_node.off_host import MOST_LAG


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
    assert len(lost(swarm)) == 1 and lost(swarm)[0] <= MOST_LAG
    assert (tmp_path / f"run-host-{stage}-1" / "redo").exists()
    swarm.check_equal(calm)
