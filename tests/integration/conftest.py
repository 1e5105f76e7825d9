"""A whole swarm inside one test: the real anchor, stages and replay sampler over loopback gRPC, in one event loop."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from anchor_node.serve import ServeArguments, serve
from swarm_core.config import load
from swarm_core.run_folder import ADDRESS_FILE
from swarm_worker.sampler.process import SamplerArguments, serve_rollouts
from swarm_worker.stage_process import StageArguments, hold_stage

VOCAB = 48
SHIPPED_MODEL = Path(__file__).parents[2] / "examples" / "tiny" / "model"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_model(family: str, to: Path) -> Path:
    """A tiny random checkpoint of a family: an untied Llama, a tied Qwen2, a Qwen3 (qk-norm); all with GQA."""
    torch.manual_seed({"llama": 1, "qwen2": 2, "qwen3": 3}[family])
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=family == "qwen2",
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(to)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED_MODEL / name, to)  # fewer tokens than VOCAB, which calibration does not mind
    return to


def make_record(path: Path, batches: int, prompts: int, group: int, seed: int = 0) -> Path:
    """Recorded rollouts in the documented format: random tokens, rewards with some groups without spread."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for batch in range(batches):
            for place in range(prompts):
                prompt = [rng.randrange(3, VOCAB) for _ in range(rng.randint(2, 6))]
                settled = place % 4 == 3
                for _ in range(group):
                    completion = [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 7))]
                    line = {
                        "batch": batch,
                        "group": place,
                        "row": place,
                        "prompt_ids": prompt,
                        "completion_ids": completion,
                        "logprobs": [-rng.uniform(2.5, 5.0) for _ in completion],
                        "reward": 1.0 if settled else float(rng.random() < 0.5),
                        "truncated": False,
                        "weight_version": 0,
                    }
                    file.write(json.dumps(line) + "\n")
    return path


@dataclass
class Recipe:
    """A run file in the making."""

    folder: Path
    model: Path
    record: Path

    def run_file(self, text: str = "", **sections: dict[str, Any]) -> Path:
        base: dict[str, dict[str, Any]] = {
            "run": {"name": "test", "ticks": 20},
            "model": {"path": str(self.model)},
            "swarm": {"stages": 3, "microbatch_size": 8},
            "data": {"train": str(self.folder / "rows.jsonl")},
            "grpo": {"prompts_per_batch": 8, "completions_per_prompt": 4, "ticks_per_pass": 2, "max_reuse": 2},
            "dgg": {"enabled": False},
            "optimizer": {"lr": 1e-3, "max_grad_norm": 0.5},
            "links": {"kind": "identity"},
            "sampler": {"engine": "replay", "replay": str(self.record)},
        }
        for name, knobs in sections.items():
            base.setdefault(name, {}).update(knobs)
        (self.folder / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
        lines = [text]
        for name, knobs in base.items():
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in knobs.items())]
        path = self.folder / "run.toml"
        path.write_text("\n".join(lines) + "\n")
        return path


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    def make(family: str = "llama", batches: int = 6, seed: int = 0) -> Recipe:
        model = make_model(family, tmp_path / f"model-{family}")
        record = make_record(tmp_path / "record.jsonl", batches, prompts=8, group=4, seed=seed)
        return Recipe(tmp_path, model, record)

    return make


async def served(arguments: ServeArguments) -> str:
    """An anchor of its own: a stage that fails here does not cancel it while it says goodbye to the others."""
    task = asyncio.create_task(serve(arguments, signals=False))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task}, timeout=1.0)
        task.cancel()  # it waited for a sampler, say
        await asyncio.wait({task})
        raise


async def swarm(
    run_file: Path,
    out: Path,
    *,
    overrides: dict[str, str] | None = None,
    resume: bool = False,
    before: Callable[[str], Coroutine[Any, Any, None]] | None = None,
    during: Callable[[str], Coroutine[Any, Any, None]] | None = None,
) -> str:
    """Run a swarm to its end; returns why it ended. `before(anchor_address)` has the anchor alone, `during` runs beside all."""
    config = load(run_file, overrides or {})
    (out / ADDRESS_FILE).unlink(missing_ok=True)
    arguments = ServeArguments(config, run_file, "127.0.0.1:0", out, resume)
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        ending = tasks.create_task(served(arguments))
        while not (out / ADDRESS_FILE).exists():
            if ending.done():
                return ending.result()
            await asyncio.sleep(0.005)
        address = (out / ADDRESS_FILE).read_text().strip()
        if before is not None:
            await before(address)
        for stage in range(config.swarm.stages):
            tasks.create_task(hold_stage(StageArguments(stage, address, out=out), signals=False))
        tasks.create_task(serve_rollouts(SamplerArguments(address, out=out), signals=False))
        if during is not None:
            tasks.create_task(during(address))
    return ending.result()


@pytest.fixture
def anchor() -> Callable[[ServeArguments], Coroutine[Any, Any, str]]:
    return served


@pytest.fixture
def run_swarm() -> Callable[..., str]:
    return lambda *arguments, **named: asyncio.run(swarm(*arguments, **named))
