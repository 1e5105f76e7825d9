"""Real processes, killed with SIGKILL at random while ticks flow and started again: the weights are those of a calm run.

`KEDGE_KILLS=100` (`make test-faults`) kills more often, `KEDGE_SEED` chooses whom and when.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from swarm_core.run_folder import JOURNAL_FILE
from swarm_worker.failpoints import VARIABLE

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'proto'}", "OMP_NUM_THREADS": "1"}
KILLS, SEED = int(os.environ.get("KEDGE_KILLS", "3")), int(os.environ.get("KEDGE_SEED", "1"))
LIMIT_S = 180.0  # between two kills: importing torch on a loaded machine, twice


class Processes:
    """An anchor, its stages and a sampler, each a process that is started again when it is gone."""

    def __init__(self, run_file: Path, out: Path, stages: int, failpoints: str = "") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        out.mkdir(parents=True)
        self.out = out
        self._environment = {**ENVIRONMENT, VARIABLE: failpoints}
        worker = [sys.executable, "-m", "swarm_worker.cli"]
        common = ["--anchor", address, "--out", str(out)]
        serve = [sys.executable, "-m", "anchor_node.cli", "serve", "--config", str(run_file), "--out", str(out)]
        self._commands = {"anchor": [*serve, "--listen", address, "--log", str(out / "anchor-words.log")]}
        for stage in range(stages):
            self._commands[f"stage {stage}"] = [*worker, "join", "--stage", str(stage), *common]
        self._commands["sampler"] = [*worker, "sample", *common]
        self.running = {name: self._start(name) for name in self._commands}

    def _start(self, name: str, *more: str) -> subprocess.Popen[bytes]:
        with (self.out / f"{name}.log").open("ab") as log:
            return subprocess.Popen([*self._commands[name], *more], env=self._environment, stdout=log, stderr=log)

    @property
    def ticks(self) -> int:
        path = self.out / JOURNAL_FILE
        return len(path.read_text().splitlines()) if path.exists() else 0

    def kill(self, name: str) -> None:
        self.running[name].send_signal(signal.SIGKILL)
        self.running[name].wait()

    def see_to_it(self) -> bool:
        """Start anew whoever was killed; whether the run is still on. Raises where somebody failed."""
        for name, process in self.running.items():
            code = process.poll()
            assert code in (None, 0, -signal.SIGKILL), (
                f"{name}: {code}\n{(self.out / f'{name}.log').read_text()[-2000:]}"
            )
            if code == -signal.SIGKILL:
                self.running[name] = self._start(name, *(["--resume"] if name == "anchor" else []))
        return self.running["anchor"].poll() is None

    def until(self, ticks: int) -> bool:
        """Wait until so many ticks are decided; False when the run is over."""
        deadline = time.monotonic() + LIMIT_S
        while self.see_to_it():
            if self.ticks >= ticks:
                return True
            assert time.monotonic() < deadline, f"no tick after {self.ticks} in {LIMIT_S} s (seed {SEED})"
            time.sleep(0.02)
        return False

    def end(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        while any(p.poll() is None for p in self.running.values()) and time.monotonic() < deadline:
            self.see_to_it()
            time.sleep(0.05)

    def stop(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()


def test_whoever_is_killed_as_soon_as_ticks_flow_nothing_is_lost(run_file: Path, calm: Any, tmp_path: Path) -> None:
    """The next kill comes once a tick was decided after the last one; what is left of the run then goes on in peace."""
    print(f"seed {SEED}")
    kills, runs = 0, 0
    while kills < KILLS:
        swarm = type(calm)(run_file, tmp_path / f"run-{runs}")
        processes, draw = Processes(run_file, swarm.out, 3), random.Random(SEED + runs)
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


def test_everybody_is_killed_at_once_and_goes_on_where_the_logs_end(run_file: Path, calm: Any, tmp_path: Path) -> None:
    """As by a power cut: the newest checkpoint is of tick 8, and no tick is lost."""
    swarm = type(calm)(run_file, tmp_path / "run")
    processes = Processes(run_file, swarm.out, 3)
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


def test_processes_that_die_at_named_points_lose_nothing(run_file: Path, calm: Any, tmp_path: Path) -> None:
    points = ["1-voting@3", "2-saving@8", "0-decided@9", "2-applied@12", "1-saved@16"]
    swarm = type(calm)(run_file, tmp_path / "run")
    processes = Processes(run_file, swarm.out, 3, ",".join(str(tmp_path / point) for point in points))
    try:
        processes.end()
    finally:
        processes.stop()
    assert all((tmp_path / point).exists() for point in points), "each was reached"
    assert len(swarm.events("fence")) == len(points)
    swarm.check_equal(calm)


def test_a_frozen_stage_is_noticed_and_goes_on_when_it_wakes(run_file: Path, calm: Any, tmp_path: Path) -> None:
    """Its streams stand, so that nothing but silence tells; nobody takes its place, and it takes it again itself."""
    swarm = type(calm)(run_file, tmp_path / "run")
    processes = Processes(run_file, swarm.out, 3)
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
