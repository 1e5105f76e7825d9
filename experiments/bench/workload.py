"""What both sides of the bench train on: a model, a run file and recorded rollouts, built from a seed. Starts nothing.

Every sequence of a workload has the same total length, so a microbatch has no padding and all microbatches have one
shape: torch's schedule wants fixed shapes, and neither side may win by padding less.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from swarm_core.learning.rollout import Completion, RolloutBatch
from swarm_worker.sampler.replay import ReplayWriter

ROOT = Path(__file__).resolve().parents[2]
TINY_MODEL = ROOT / "examples" / "tiny" / "model"
STAGES = 2
RECORDED = 4  # different batches; both sides cycle through them


@dataclass(frozen=True)
class Workload:
    """One row of the bench: a model and the shape of a tick. Lengths in tokens."""

    name: str
    vocab: int
    prompts: int
    group_size: int
    microbatch_size: int
    length: int
    shortest_prompt: int
    longest_prompt: int
    turn: int  # counted ticks of a turn: a few seconds
    model: Path | None = None  # a checkpoint; None: random weights of the size below
    hidden: int = 0
    intermediate: int = 0
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0

    @property
    def sequences(self) -> int:
        return self.prompts * self.group_size

    @property
    def microbatches(self) -> int:
        return self.sequences // self.microbatch_size

    @property
    def tokens(self) -> int:
        """Tokens of a tick, prompts included: what goes through the layers."""
        return self.sequences * self.length


# Compute dominates: at width 384 a microbatch of 192 tokens is 0.3 MB on the link and a tenth of a second of work a stage.
WIDE = Workload(
    "wide", 512, prompts=8, group_size=4, microbatch_size=4, length=48, shortest_prompt=12, longest_prompt=24, turn=4,
    hidden=384, intermediate=1024, layers=8, heads=6, kv_heads=2,
)  # fmt: skip
# The model and the tick of `make demo`: a few milliseconds of work a microbatch, so overheads show.
TINY = Workload(
    "tiny", 18, prompts=32, group_size=8, microbatch_size=64, length=12, shortest_prompt=6, longest_prompt=8, turn=12,
    model=TINY_MODEL,
)  # fmt: skip
WORKLOADS = {workload.name: workload for workload in (WIDE, TINY)}


@dataclass(frozen=True)
class Setup:
    """The files of a workload."""

    workload: Workload
    config: Path
    model: Path
    rollouts: Path
    pipe: Path


def build(workload: Workload, folder: Path, seed: int = 0) -> Setup:
    """Write everything into `folder`. The run file replays from `pipe`, which the swarm's side makes and feeds."""
    folder.mkdir(parents=True, exist_ok=True)
    setup = Setup(workload, folder / "run.toml", folder / "model", folder / "rollouts.jsonl", folder / "rollouts.pipe")
    if workload.model is None:
        _random_model(workload, setup.model, seed)
    else:
        shutil.copytree(workload.model, setup.model)
    with ReplayWriter(setup.rollouts, workload.group_size, workload.prompts) as writer:
        for batch in _rollouts(workload, random.Random(seed)):
            writer.append(batch)
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    setup.config.write_text(_run_file(workload))
    return setup


def _random_model(workload: Workload, path: Path, seed: int) -> None:
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=workload.vocab,
        hidden_size=workload.hidden,
        intermediate_size=workload.intermediate,
        num_hidden_layers=workload.layers,
        num_attention_heads=workload.heads,
        num_key_value_heads=workload.kv_heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=1,
        bos_token_id=None,
    )
    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # transformers initialises from the global generator
        transformers.Qwen2ForCausalLM(config).save_pretrained(path)


def _rollouts(workload: Workload, generator: random.Random) -> list[RolloutBatch]:
    """Random tokens with random rewards: no group is without variance, so every sequence costs compute."""
    batches = []
    for number in range(RECORDED):
        completions = []
        for prompt in range(workload.prompts):
            size = generator.randint(workload.shortest_prompt, workload.longest_prompt)
            prompt_ids = generator.choices(range(2, workload.vocab), k=size)
            for _ in range(workload.group_size):
                ids = generator.choices(range(2, workload.vocab), k=workload.length - size)
                logprobs = [round(-generator.uniform(1.0, 8.0), 3) for _ in ids]
                reward = generator.random()
                completions.append(Completion(prompt, prompt_ids, ids, logprobs, reward, truncated=True))
        batches.append(RolloutBatch(number, 0, workload.group_size, completions))
    return batches


def _run_file(workload: Workload) -> str:
    """Identity links, one tick a batch and one pass over it (so nothing is scored), fp32, one thread."""
    return f"""\
[run]
name = "bench-{workload.name}"
ticks = 0
device = "cpu"
precision = "fp32"
threads = 1

[model]
path = "./model"

[swarm]
stages = {STAGES}
microbatch_size = {workload.microbatch_size}

[data]
train = "rows.jsonl"

[grpo]
prompts_per_batch = {workload.prompts}
completions_per_prompt = {workload.group_size}
ticks_per_pass = 1
max_reuse = 1
max_completion_length = {workload.length}

[optimizer]
lr = 1e-5

[links]
kind = "identity"
zstd = "off"

[sampler]
engine = "replay"
replay = "rollouts.pipe"
"""
