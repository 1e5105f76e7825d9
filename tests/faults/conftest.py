"""Swarms whose members die: stages and a sampler in this process, an anchor beside them, and a calm run to compare with."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from anchor_node.serve import ServeArguments, serve
from swarm_core.config import load
from swarm_core.run_folder import ADDRESS_FILE
from swarm_worker import failpoints
from swarm_worker.sampler.process import SamplerArguments, serve_rollouts
from swarm_worker.stage_process import StageArguments, hold_stage

STAGES, TICKS = 3, 20
KNOBS: dict[str, Any] = {
    "run": {"ticks": TICKS},
    "checkpoint": {"every": 8, "keep": 2},
    "links": {"kind": "lowrank", "rank_forward": 12, "rank_backward": 12},
    "anchor": {"q_cadence": 0, "calibration_prompts": 1},
}


class Died(BaseException):
    """kill -9, as far as one process can play it for a part of itself: nothing of the stage runs any more."""


class Swarm:
    """A swarm whose stages can be made to die, and come back with what they had on disk."""

    def __init__(self, run_file: Path, out: Path, *, apart: bool = False) -> None:
        """`apart`: every stage has a host of its own, and one that dies is lost with it."""
        self.run_file, self.out, self.apart = run_file, out, apart
        self.deaths = 0
        self.members: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(
        self,
        beside: Callable[[Swarm], Awaitable[None]] | None = None,
        limit_s: float = 120.0,
        *,
        resume: bool = False,
    ) -> str:
        """To the end of the run; returns its reason."""
        config = load(self.run_file, {})
        (self.out / ADDRESS_FILE).unlink(missing_ok=True)
        anchor = asyncio.create_task(
            serve(ServeArguments(config, self.run_file, "127.0.0.1:0", self.out, resume), signals=False)
        )
        disturbing = None
        try:
            async with asyncio.timeout(limit_s):
                while not (self.out / ADDRESS_FILE).exists() and not anchor.done():
                    await asyncio.sleep(0.005)
                self.address = (self.out / ADDRESS_FILE).read_text().strip()
                for stage in range(config.swarm.stages):
                    self.start_stage(stage)
                self.start_sampler()
                disturbing = asyncio.create_task(beside(self)) if beside is not None else None
                reason = await anchor
                await asyncio.gather(*self.members.values())
                if disturbing is not None:
                    await disturbing
                return reason
        finally:
            for task in (anchor, *self.members.values(), *([disturbing] if disturbing else [])):
                task.cancel()
            await asyncio.wait({anchor, *self.members.values()}, timeout=10)

    def start_stage(self, stage: int) -> None:
        self.members[f"stage {stage}"] = asyncio.create_task(self._live(stage))

    def start_sampler(self) -> None:
        arguments = SamplerArguments(self.address, out=self.out)
        self.members["sampler"] = asyncio.create_task(serve_rollouts(arguments, signals=False))

    async def _live(self, stage: int) -> None:
        while True:
            out = self.out.parent / f"{self.out.name}-host-{stage}-{self.deaths}" if self.apart else self.out
            try:
                return await hold_stage(StageArguments(stage, self.address, out=out), signals=False)
            except Died:
                self.deaths += 1

    async def kill_sampler(self) -> None:
        self.members["sampler"].cancel()
        await asyncio.wait({self.members["sampler"]})
        self.start_sampler()

    # What is left of it ------------------------------------------------------------------------------------------------

    def journal(self) -> list[dict[str, Any]]:
        folder = self.out / "copies" / "stage-00-of-03" if self.apart else self.out
        path = folder / "journal.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def rows(self, kind: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        return [row for row in found if row["type"] == kind]

    def events(self, name: str) -> list[str]:
        return [row["message"] for row in self.rows("event") if row["event"] == name]

    def weights(self) -> dict[str, torch.Tensor]:
        folder = self.out / "checkpoints" / f"tick-{TICKS:08d}"
        files = sorted(folder.glob("stage-*.safetensors"))
        assert len(files) == STAGES and (folder / "COMPLETE").exists()
        return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}

    def check_equal(self, calm: Swarm) -> None:
        """Bit for bit the calm run's weights and moments, the same decisions, every row of a tick once."""
        assert Counter(row["tick"] for row in self.rows("tick")) == {tick: 1 for tick in range(TICKS)}
        decided = ("tick", "batch", "pass", "slice", "step", "outcome", "coefficient")
        mine, its = ([[line[name] for name in decided] for line in swarm.journal()] for swarm in (self, calm))
        assert mine == its
        wanted, got = calm.weights(), self.weights()
        assert wanted.keys() == got.keys() and all(torch.equal(wanted[name], got[name]) for name in wanted)


@pytest.fixture
def dies(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`dies("voting", 1, 5)`: stage 1 dies where it is about to vote on tick 5, once; several calls add up."""
    planned: set[tuple[str, int, int]] = set()

    def hit(name: str, stage: int, tick: int) -> None:
        if (name, stage, tick) in planned:
            planned.remove((name, stage, tick))
            raise Died(f"stage {stage}, {name}, tick {tick}")

    monkeypatch.setattr(failpoints, "hit", hit)
    return lambda name, stage, tick: planned.add((name, stage, tick))


def _recipe_module() -> Any:
    """The recipe of the integration tests: a small model and recorded rollouts."""
    path = Path(__file__).parents[1] / "integration" / "conftest.py"
    spec = importlib.util.spec_from_file_location("integration_recipes", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["integration_recipes"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipes, folder = _recipe_module(), tmp_path_factory.mktemp("faults")
    model = recipes.make_model("llama", folder / "model")
    record = recipes.make_record(folder / "record.jsonl", 6, prompts=8, group=4, seed=0)
    return recipes.Recipe(folder, model, record).run_file(**KNOBS)


@pytest.fixture(scope="session")
def calm(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Swarm:
    """The undisturbed run."""
    swarm = Swarm(run_file, tmp_path_factory.mktemp("calm") / "run")
    asyncio.run(swarm.run())
    return swarm
