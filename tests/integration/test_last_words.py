"""Whoever watches an anchor is told why a process ended, why there is no reward, and how a waiting swarm goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from anchor_node import serve as serving
from anchor_node.serve import ServeArguments
from swarm_core.config import load
from swarm_core.run_folder import ADDRESS_FILE
from swarm_worker.sampler.errors import SamplerError, VerifierError
from swarm_worker.sampler.process import SamplerArguments, serve_rollouts
from swarm_worker.stage_process import StageArguments, hold_stage

Anchor = Callable[[ServeArguments], Coroutine[Any, Any, str]]
TINY = Path(__file__).parents[2] / "examples" / "tiny" / "run.toml"
SMALL = {"run.ticks": "2", "grpo.prompts_per_batch": "4", "grpo.max_reuse": "1", "sampler.eval_prompts": "4",
         "anchor.calibration_prompts": "4"}  # fmt: skip


def rows(out: Path, event: str = "") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row.get("event", row["type"]) == event]


def cause_of(failed: BaseException, kind: type[BaseException]) -> str:
    """The message of the one error of this kind, in whatever groups it is wrapped."""
    if isinstance(failed, BaseExceptionGroup):
        found = failed.subgroup(lambda error: type(error) is kind)
        assert found is not None, failed
        return cause_of(found.exceptions[0], kind)
    return str(failed)


def test_a_reward_function_that_always_raises_is_told_and_gives_no_reward(
    run_swarm: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reward_that_raises.py").write_text("def reward(**columns):\n    raise KeyError('gold')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "run"
    run_swarm(TINY, out, overrides={**SMALL, "data.reward": "reward_that_raises:reward"})
    told = [row["message"] for row in rows(out, "verifier_failed")]
    assert "batch 0: 32 of 32 verifier calls raised: KeyError: 'gold'" in told
    assert "batch 0: evaluation: 4 of 4 verifier calls raised: KeyError: 'gold'" in told
    assert len(told) == len(set(told)), "once a batch"
    assert [row["reward"] for row in rows(out, "tick")] == [None, None]


async def without_sampler(anchor: Anchor, out: Path, then: dict[str, Any], overrides: dict[str, str]) -> None:
    """Start all but the sampler; once the anchor has asked for one twice, start it."""
    arguments = ServeArguments(load(TINY, {**SMALL, **overrides}), TINY, "127.0.0.1:0", out, False)
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        tasks.create_task(anchor(arguments))
        while not (out / ADDRESS_FILE).exists():
            await asyncio.sleep(0.01)
        address = (out / ADDRESS_FILE).read_text().strip()
        for stage in range(3):
            tasks.create_task(hold_stage(StageArguments(stage, address, out=out), signals=False))
        while len(rows(out, "waiting")) < 2:
            await asyncio.sleep(0.05)
        assert rows(out, "waiting")[1]["message"] == f"for a sampler; start: swarm_worker sample --anchor {address}"
        tasks.create_task(serve_rollouts(SamplerArguments(address, out=out, **then), signals=False))


def test_a_swarm_without_a_sampler_says_how_to_go_on(
    anchor: Anchor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "REMIND_S", 0.3)
    asyncio.run(without_sampler(anchor, tmp_path, {}, {}))
    assert [row["tick"] for row in rows(tmp_path, "tick")] == [0, 1]


@pytest.mark.parametrize(
    ("then", "overrides", "error", "words"),
    [
        ({"replay": Path("r.jsonl")}, {}, SamplerError, "--replay r.jsonl is given, but the engine is hf"),
        ({}, {"data.reward": "nowhere:reward"}, VerifierError, "nowhere:reward"),
    ],
)
def test_the_anchor_says_why_a_sampler_ended(
    anchor: Anchor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    then: dict[str, Any],
    overrides: dict[str, str],
    error: type[BaseException],
    words: str,
) -> None:
    monkeypatch.setattr(serving, "REMIND_S", 0.3)
    with pytest.raises(BaseExceptionGroup) as caught:
        asyncio.run(without_sampler(anchor, tmp_path, then, overrides))
    assert words in cause_of(caught.value, error)
    (told,) = rows(tmp_path, "failed")
    assert told["message"].startswith("the sampler: ") and words in told["message"]
