"""Real processes, killed with SIGKILL at random while ticks flow and started again: the weights are those of a calm run.

`KEDGE_KILLS=100` (`make test-faults`) kills more often, `KEDGE_SEED` chooses whom and when.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from processes import LIMIT_S, Processes
from warm_programs import WarmPrograms

KILLS, SEED = int(os.environ.get("KEDGE_KILLS", "3")), int(os.environ.get("KEDGE_SEED", "1"))


def test_whoever_is_killed_as_soon_as_ticks_flow_nothing_is_lost(
    run_file: Path, calm: Any, programs: WarmPrograms, tmp_path: Path
) -> None:
    """The next kill comes once a tick was decided after the last one; what is left of the run then goes on in peace."""
    print(f"seed {SEED}")
    kills, runs = 0, 0
    while kills < KILLS:
        swarm = type(calm)(run_file, tmp_path / f"run-{runs}")
        processes, draw = Processes(programs, run_file, swarm.out, 3), random.Random(SEED + runs)
        names = ["stage 0", "stage 1", "stage 2", "sampler", "anchor"]
        try:
            while kills < KILLS and processes.until(processes.ticks + 1 + draw.randrange(2)):
                processes.kill(draw.choice(names))
                kills += 1
            processes.end()
        finally:
            processes.stop()
        swarm.check_equal(calm)
        assert all(row["lost_ticks"] == 0 for row in swarm.rows("event") if "lost_ticks" in row)
        runs += 1


def test_everybody_is_killed_at_once_and_goes_on_where_the_logs_end(
    run_file: Path, calm: Any, programs: WarmPrograms, tmp_path: Path
) -> None:
    """As by a power cut: the newest checkpoint is of tick 8, and no tick is lost."""
    swarm = type(calm)(run_file, tmp_path / "run")
    processes = Processes(programs, run_file, swarm.out, 3)
    try:
        assert processes.until(12)
        for name in processes.running:
            processes.kill(name)
        processes.see_to_it()
        processes.end()
    finally:
        processes.stop()
    assert len(swarm.events("fence")) == 1
    assert [row["lost_ticks"] for row in swarm.rows("event") if "lost_ticks" in row] == [0]
    swarm.check_equal(calm)


def test_processes_that_die_at_named_points_lose_nothing(
    run_file: Path, calm: Any, programs: WarmPrograms, tmp_path: Path
) -> None:
    points = ["1-voting@3", "2-saving@8", "0-decided@9", "2-applied@12", "1-saved@16"]
    swarm = type(calm)(run_file, tmp_path / "run")
    processes = Processes(programs, run_file, swarm.out, 3, ",".join(str(tmp_path / point) for point in points))
    try:
        processes.end()
    finally:
        processes.stop()
    assert all((tmp_path / point).exists() for point in points), "each was reached"
    assert len(swarm.events("fence")) == len(points)
    swarm.check_equal(calm)


def test_a_frozen_stage_is_noticed_and_goes_on_when_it_wakes(
    run_file: Path, calm: Any, programs: WarmPrograms, tmp_path: Path
) -> None:
    """Its streams stand, so that nothing but silence tells; nobody takes its place, and it takes it again itself."""
    swarm = type(calm)(run_file, tmp_path / "run")
    processes = Processes(programs, run_file, swarm.out, 3)
    try:
        assert processes.until(4)
        processes.running["stage 1"].send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + LIMIT_S
        while not swarm.events("fence") and time.monotonic() < deadline:
            time.sleep(0.1)
        processes.running["stage 1"].send_signal(signal.SIGCONT)
        processes.end()
    finally:
        processes.stop()
    assert "stage 1" in swarm.events("fence")[0]
    swarm.check_equal(calm)
