"""The swarm's side: anchor, two pinned stages and a sampler, fed through a pipe so that it works only on its turn.

The sampler replays a recording that is a named pipe. A turn of n ticks is n batches written into it; between turns the
stages wait for rollouts and use no CPU. What is measured comes from the run's own metrics.jsonl.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.bench.sides import Tick, Turn
from experiments.bench.workload import STAGES, Setup
from experiments.children import BenchError, Child

START_LIMIT_S = 180.0
TURN_LIMIT_S = 600.0


class SwarmSide:
    """A running swarm. `turn(n)` lets it train n batches. `overrides` are knobs as `serve --set` takes them."""

    def __init__(
        self, setup: Setup, folder: Path, cores: Sequence[int], name: str = "swarm", overrides: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.out = folder / "run"
        self.out.mkdir(parents=True)
        lines = [json.loads(line) for line in setup.rollouts.read_text().splitlines()]
        self._recorded = [[line for line in lines if line["batch"] == b] for b in range(lines[-1]["batch"] + 1)]
        self._fed = 0
        os.mkfifo(setup.pipe)
        # Both ends, so that opening does not wait for a reader; not blocking, so that a dead one is noticed.
        self._pipe = os.open(setup.pipe, os.O_RDWR | os.O_NONBLOCK)
        anchor = ["serve", "--config", setup.config, "--listen", "127.0.0.1:0", "--out", self.out]
        anchor += [word for override in overrides for word in ("--set", override)]
        self.anchor = Child("anchor", "anchor_node.cli", anchor, folder, talks=False)
        address = self._await_address()
        common = ["--anchor", address, "--out", self.out]
        self.stages = [
            Child(f"stage-{i}", "swarm_worker.cli", ["join", "--stage", i, *common], folder, core=cores[i])
            for i in range(STAGES)
        ]
        self.sampler = Child("sampler", "swarm_worker.cli", ["sample", *common], folder, talks=False)

    def turn(self, ticks: int) -> Turn:
        """Train `ticks` batches and wait for the last one's metrics."""
        before = [stage.cpu_s() for stage in self.stages]
        self._feed(ticks)
        rows = self._await_ticks(self._fed)
        # The last tick is applied after its decision; it must not run into the other side's turn.
        time.sleep(2 * rows[-1]["tick_s"] / rows[-1]["microbatches"])
        after = [stage.cpu_s() for stage in self.stages]
        measured = [
            Tick(row["tick_s"], tuple(row[f"busy_s/stage_{i}"] for i in range(STAGES))) for row in rows[-ticks:]
        ]
        return Turn(measured, tuple((b - a) / ticks for a, b in zip(before, after, strict=True)))

    def close(self) -> None:
        """Let the run end as a run does when its recording is used up, one batch after the last turn."""
        self._write(self._batch(self._fed)[1:])
        os.close(self._pipe)
        for child in (self.anchor, *self.stages, self.sampler):
            child.close()

    def kill(self) -> None:
        for child in (self.anchor, *self.stages, self.sampler):
            child.process.kill()
            child.process.wait()

    def _feed(self, ticks: int) -> None:
        """Write the next batches. The reader sees that a batch is whole by the line after it, so one line runs ahead."""
        ahead = 0 if self._fed == 0 else 1  # its first line is in the pipe already
        lines = [line for n in range(self._fed, self._fed + ticks) for line in self._batch(n)]
        self._fed += ticks
        lines.append(self._batch(self._fed)[0])
        self._write(lines[ahead:])

    def _write(self, lines: Sequence[str]) -> None:
        rest = memoryview("".join(lines).encode())
        while rest:
            try:
                rest = rest[os.write(self._pipe, rest) :]
            except BlockingIOError:  # full: the sampler reads a batch when one is ordered
                self._check_alive()
                time.sleep(0.05)

    def _check_alive(self) -> None:
        for child in (self.anchor, *self.stages, self.sampler):
            if child.process.poll() is not None:
                raise child.died()

    def _batch(self, number: int) -> list[str]:
        recorded = self._recorded[number % len(self._recorded)]
        return [json.dumps({**line, "batch": number}) + "\n" for line in recorded]

    def _await_address(self) -> str:
        deadline = time.monotonic() + START_LIMIT_S
        file = self.out / "anchor_address"
        while time.monotonic() < deadline:
            if self.anchor.process.poll() is not None:
                raise self.anchor.died()
            if file.exists() and (text := file.read_text().strip()):
                return text
            time.sleep(0.05)
        raise BenchError(f"the anchor did not come up within {START_LIMIT_S:.0f} s; see {self.anchor.log}")

    def _await_ticks(self, count: int) -> list[dict[str, Any]]:
        deadline = time.monotonic() + TURN_LIMIT_S
        path = self.out / "metrics.jsonl"
        while time.monotonic() < deadline:
            self._check_alive()
            text = path.read_text() if path.exists() else ""
            rows = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
            ticks = [row for row in rows if row["type"] == "tick"]
            if len(ticks) >= count:
                return ticks
            time.sleep(0.1)  # seldom: this process shares the stages' cores
        raise BenchError(f"the swarm made no {count} ticks within {TURN_LIMIT_S:.0f} s; logs in {self.out.parent}")
