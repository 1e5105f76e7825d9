"""The oldest law: with identity links a swarm trains, bit for bit, the weights of one process and of plain torch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

from anchor_node.export import export_run
from swarm_core.wire.frames import Frame, Header
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import FrameKind, Hello, Ready, Stop, to_bytes
from swarm_core.wire.streams import dial

Recipe = Any
TICKS = 20


def untied(path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def plain_torch(model_path: Path, record: Path, ticks: int, microbatch: int = 8) -> dict[str, Tensor]:
    """GRPO (dapo, token level, truncated importance sampling) as one would write it in an afternoon."""
    model = untied(model_path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    tick, batch = 0, 0

    def logprobs(chunk: list[dict[str, Any]]) -> Tensor:
        sequences = [torch.tensor(c["prompt_ids"] + c["completion_ids"]) for c in chunk]
        width = max(len(s) for s in sequences)
        h = model.model(torch.stack([pad(s, (0, width - len(s))) for s in sequences])).last_hidden_state
        spans = [(len(c["prompt_ids"]), len(c["completion_ids"])) for c in chunk]
        rows = torch.cat([h[i, p - 1 : p - 1 + n] for i, (p, n) in enumerate(spans)])
        targets = torch.tensor([t for c in chunk for t in c["completion_ids"]])
        return torch.log_softmax(rows @ model.lm_head.weight.T, -1).gather(1, targets[:, None]).squeeze(1)

    while tick < ticks:
        rollouts = [line for line in lines if line["batch"] == batch]
        for at in range(0, len(rollouts), 4):
            rewards = torch.tensor([r["reward"] for r in rollouts[at : at + 4]], dtype=torch.float64)
            for r, reward in zip(rollouts[at : at + 4], rewards, strict=True):
                r["advantage"] = float((reward - rewards.mean()) / (rewards.std() + 1e-4))
        halves = [rollouts[:16], rollouts[16:]]
        tokens = [sum(len(c["completion_ids"]) for c in half) for half in halves]
        kept = [
            sorted((c for c in h if c["advantage"]), key=lambda c: len(c["prompt_ids"] + c["completion_ids"]))
            for h in halves
        ]
        chunks = [[half[i : i + microbatch] for i in range(0, len(half), microbatch)] for half in kept]
        with torch.no_grad():
            old = [[logprobs(chunk) for chunk in half] for half in chunks]
        for index in (0, 1, 0, 1):
            for chunk, old_M in zip(chunks[index], old[index], strict=True):
                ratio = torch.exp(logprobs(chunk) - old_M)
                advantage = torch.tensor(
                    [c["advantage"] for c in chunk for _ in c["completion_ids"]], dtype=torch.float32
                )
                behaviour = torch.tensor([x for c in chunk for x in c["logprobs"]])
                weight = torch.exp(old_M - behaviour).clamp(max=2.0)
                loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) * weight
                (loss.sum() / tokens[index]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            tick += 1
        batch += 1
    return {name: p.detach() for name, p in model.named_parameters()}


def trained(out: Path, to: Path) -> dict[str, Tensor]:
    export_run(out, to)
    return {
        name: p.detach() for name, p in AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32).named_parameters()
    }


def assert_same_bits(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(got) == list(wanted)
    different = [name for name in wanted if not torch.equal(got[name], wanted[name])]
    assert not different, f"{len(different)} of {len(wanted)} tensors differ, first {different[:3]}"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_three_stages_equal_one_process_and_plain_torch(
    family: str, recipe: Callable[..., Recipe], run_swarm: Callable[..., str], tmp_path: Path
) -> None:
    made = recipe(family)
    run_file = made.run_file()
    run_swarm(run_file, tmp_path / "three")
    run_swarm(run_file, tmp_path / "one", overrides={"swarm.stages": "1"})
    three, one = trained(tmp_path / "three", tmp_path / "hf3"), trained(tmp_path / "one", tmp_path / "hf1")
    initial = dict(untied(made.model).named_parameters())
    assert any(not torch.equal(three[name], initial[name]) for name in three), "nothing was learned"
    assert_same_bits(three, one)
    assert_same_bits(three, plain_torch(made.model, made.record, TICKS))


def test_resume_equals_an_undisturbed_run(
    recipe: Callable[..., Recipe], run_swarm: Callable[..., str], tmp_path: Path
) -> None:
    made = recipe("qwen3")
    run_file = made.run_file(checkpoint={"every": 5})
    run_swarm(run_file, tmp_path / "whole")
    # Tick 10 lies in the middle of a batch: its old log-probs must come back from the checkpoint.
    run_swarm(run_file, tmp_path / "parts", overrides={"run.ticks": "10"})
    run_swarm(run_file, tmp_path / "parts", resume=True)
    assert_same_bits(trained(tmp_path / "parts", tmp_path / "a"), trained(tmp_path / "whole", tmp_path / "b"))
    journals = [(tmp_path / run / "journal.jsonl").read_text() for run in ("whole", "parts")]
    assert journals[0] == journals[1]
    assert len(journals[0].splitlines()) == TICKS


@pytest.mark.parametrize("every", [0, 1], ids=["no-checkpoint-before", "stopped-on-a-checkpoint"])
def test_a_run_that_was_stopped_and_continued_equals_an_undisturbed_one(
    every: int, recipe: Callable[..., Recipe], run_swarm: Callable[..., str], tmp_path: Path
) -> None:
    # Low-rank links with a basis that stays: when a newer one is adopted depends on the clock, and is in the journal.
    made = recipe("llama", batches=12)
    links = {"kind": "lowrank", "rank_forward": 8, "rank_backward": 16}
    anchor = {"q_cadence": 0, "calibration_prompts": 1}
    run_file = made.run_file(run={"ticks": 36}, links=links, anchor=anchor, checkpoint={"every": every})
    run_swarm(run_file, tmp_path / "whole")
    out = tmp_path / "parts"

    async def stop(address: str) -> None:
        while not (out / "journal.jsonl").exists() or (out / "journal.jsonl").read_text().count("\n") < 7:
            await asyncio.sleep(0.005)
        await ask_to_stop(address)

    assert run_swarm(run_file, out, during=stop) == "stopped on request"
    stopped_at = len((out / "journal.jsonl").read_text().splitlines())
    assert stopped_at < 36
    assert run_swarm(run_file, out, resume=True) == "all 36 ticks are done"
    assert_same_bits(trained(out, tmp_path / "a"), trained(tmp_path / "whole", tmp_path / "b"))
    assert (out / "journal.jsonl").read_text() == (tmp_path / "whole" / "journal.jsonl").read_text()


def test_a_hold_on_a_checkpointed_tick_ends_the_run_on_every_stage(
    recipe: Callable[..., Recipe], run_swarm: Callable[..., str], tmp_path: Path
) -> None:
    """Two recorded batches and no last tick: the run ends between ticks, on one that has its checkpoint already."""
    run_file = recipe("qwen3", batches=2).run_file(run={"ticks": 0}, checkpoint={"every": 1, "keep": 1})
    out = tmp_path / "run"
    assert run_swarm(run_file, out) == "the recorded rollouts are used up"
    folder = out / "checkpoints" / "tick-00000008"
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}
    assert "COMPLETE" in before
    assert run_swarm(run_file, out, resume=True) == "the recorded rollouts are used up"
    after = {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}
    assert after == before, "a complete checkpoint was written again"


async def ask_to_stop(address: str) -> None:
    """What Ctrl-C on a sampler does."""
    stream = await dial(address, "Anchor/Sample", Ledger(), "the anchor", 10.0)
    stream.name("anchor-sampler", "up")
    await stream.send(Frame(Header(FrameKind.HELLO), to_bytes(Hello(role="sampler"))))
    await stream.expect(FrameKind.WELCOME)
    await stream.send(Frame(Header(FrameKind.READY), to_bytes(Ready())))
    await stream.send(Frame(Header(FrameKind.STOP), to_bytes(Stop(reason="a test"))))
    while (frame := await stream.receive()) is not None and frame.header.kind is not FrameKind.STOP:
        pass  # bases and the start; a sampler that left before the end would be waited for
    await stream.finish()
