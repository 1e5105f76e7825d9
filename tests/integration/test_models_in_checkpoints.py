"""With every checkpoint there is a model that transformers loads: bit for bit what an export gives, tied embeddings or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from anchor_node.export import export_run


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # qwen2 is tied
def test_a_checkpoint_is_a_model_that_equals_its_export(
    recipe: Callable[..., Any], run_swarm: Callable[..., str], tmp_path: Path, family: str
) -> None:
    run_file = recipe(family).run_file(run={"ticks": 6}, checkpoint={"every": 2, "keep": 2})
    out = tmp_path / "run"
    run_swarm(run_file, out)
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == ["tick-00000004", "tick-00000006"], "older ones go with their checkpoint"
    for name in kept:
        folder = out / "checkpoints" / name
        export_run(folder, tmp_path / name)
        assert sorted(path.name for path in (folder / "hf").glob("*.safetensors")) == [
            f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
        ]
        mine, its = (AutoModelForCausalLM.from_pretrained(path) for path in (folder / "hf", tmp_path / name))
        assert mine.config.to_dict() | {"_name_or_path": ""} == its.config.to_dict() | {"_name_or_path": ""}
        wanted, got = its.state_dict(), mine.state_dict()
        assert wanted.keys() == got.keys() and all(torch.equal(wanted[key], got[key]) for key in wanted)
        assert {tensor.dtype for tensor in got.values()} == {torch.float32}
        assert AutoTokenizer.from_pretrained(folder / "hf").get_vocab()


def test_without_the_knob_there_is_none(
    recipe: Callable[..., Any], run_swarm: Callable[..., str], tmp_path: Path
) -> None:
    run_swarm(recipe().run_file(run={"ticks": 2}, checkpoint={"hf": False}), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*/hf"))
