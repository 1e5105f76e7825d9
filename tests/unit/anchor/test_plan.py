"""The dry run: what would fail only once workers compute is refused before anything starts, and the figures are whole."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from anchor_node.plan import print_plan
from swarm_core.config import load
from swarm_core.errors import UserError

TINY = Path(__file__).parents[3] / "examples" / "tiny"


def refused(*words: str, **overrides: object) -> None:
    with pytest.raises(UserError) as caught:
        print_plan(load(TINY / "run.toml", {name: str(value) for name, value in overrides.items()}))
    text = str(caught.value)
    assert "\n" not in text and [word for word in words if word not in text] == [], text


def test_the_plan_counts_prompts_and_the_score_pass(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(load(TINY / "run.toml"))
    text = " ".join(capsys.readouterr().out.split())
    assert "the longest prompt has 6 tokens, 6 more may follow" in text
    assert "3,072 tokens at most, prompts included" in text  # 64 x 8 sequences in 2 ticks, 6 + 6 tokens each
    assert "crosses once more, down only (score pass)" in text
    print_plan(load(TINY / "run.toml", {"grpo.ticks_per_pass": "1", "grpo.max_reuse": "1"}))
    assert "score pass" not in capsys.readouterr().out


def test_a_model_without_a_tokenizer_is_said_to_have_none(tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(TINY / "model" / name, tmp_path)
    refused("tokenizer in", "copy the tokenizer files", **{"model.path": tmp_path})


def test_prompts_and_completions_that_the_model_cannot_read() -> None:
    room = json.loads((TINY / "model" / "config.json").read_text())["max_position_embeddings"]
    words = (f"the longest prompt has 6 tokens and grpo.max_completion_length is {room - 5}", f"reads {room} tokens")
    refused(*words, **{"grpo.max_completion_length": room - 5})
    print_plan(load(TINY / "run.toml", {"grpo.max_completion_length": str(room - 6)}))


def test_a_reward_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_plan.py").write_text("value = 3\n")
    (tmp_path / "rewards_unplanned.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "rewards_of_a_plan", raising=False)
    refused("nowhere:reward", "cannot be imported", **{"data.reward": "nowhere:reward"})
    refused("is int, wanted a function", **{"data.reward": "rewards_of_a_plan:value"})
    refused("cannot be imported (ZeroDivisionError", **{"data.reward": "rewards_unplanned:reward"})


def test_a_recording_that_is_not_there_or_is_none(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    replay = {"sampler.engine": "replay", "sampler.replay": str(file), "data.reward": "nowhere:reward"}
    refused(str(file), "no such file", **replay)
    for text in ("", "[1]\n", "3\n", '{"prompt": "1+1="}\n'):
        file.write_text(text)
        refused(str(file), "no recorded rollout", **replay)
    file.write_text('{"batch": 0, "prompt_ids": [1], "completion_ids": [2]}\n')
    print_plan(load(TINY / "run.toml", replay))  # a replay needs no reward
