"""Export: what comes out loads in transformers and computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from swarm_core.learning.partition import partition
from swarm_core.learning.stage import Stage
from swarm_core.models.architecture import ModelError, read_shape
from swarm_core.models.export import export
from swarm_core.models.reading import load_stage, open_stage

Make = Callable[..., Path]
IDS = torch.arange(24).view(2, 12) % 53


def stages_of(path: Path, count: int = 2, dtype: torch.dtype = torch.float32) -> list[Stage]:
    return [open_stage(path, span, dtype) for span in partition(read_shape(path), count)]


def shards_of(stages: list[Stage]) -> list[dict[str, Any]]:
    return [dict(stage.hf_named_parameters()) for stage in stages]


def logits_of(stages: list[Stage]) -> torch.Tensor:
    x: torch.Tensor = IDS
    for stage in stages:
        x = stage(x)
    logits: torch.Tensor = stages[-1].lm_head(x)
    return logits.detach()


def train_a_little(stages: list[Stage]) -> None:
    """Moves every weight, so the two ends of a tied model part."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for stage in stages:
            for parameter in stage.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen2-tied", "qwen3"])
def test_round_trip_through_transformers(checkpoint: Make, tmp_path: Path, name: str, max_shard_bytes: int) -> None:
    source = checkpoint(name)
    stages = stages_of(source)
    train_a_little(stages)
    out = export(shards_of(stages), source, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    assert (len(list(out.glob("*.safetensors"))) > 1) == (max_shard_bytes < 10**9)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["dtype"] == "float32"
    loaded, report = AutoModelForCausalLM.from_pretrained(
        out, attn_implementation="sdpa", output_loading_info=True, local_files_only=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert loaded.lm_head.weight.data_ptr() != loaded.model.embed_tokens.weight.data_ptr()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, logits_of(stages))
    again = [load_stage(out, span) for span in partition(read_shape(out), 3)]
    mine = {n: p for s in shards_of(stages) for n, p in s.items()}
    assert all(torch.equal(t, mine[n]) for shard in again for n, t in shard.items())
    assert sum(len(shard) for shard in again) == len(mine)
    assert not list(out.glob("*.part"))


def test_tokenizer_files_and_sampling_defaults_come_along_and_nothing_else(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("llama")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md", "pytorch_model.bin"):
        (source / name).write_text(name)
    out = export(shards_of(stages_of(source)), source, tmp_path / "out")
    kept = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert {f.name for f in out.iterdir()} == kept | {"config.json", "model.safetensors"}
    assert all((out / n).read_bytes() == (source / n).read_bytes() for n in kept)


def test_dtype_is_converted_and_said(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float16", "torch_dtype": "float16"}))
    out = export(shards_of(stages_of(source)), source, tmp_path / "out", dtype=torch.bfloat16)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_a_second_export_replaces_a_sharded_first(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("llama")
    stages = stages_of(source)
    export(shards_of(stages), source, tmp_path / "out", max_shard_bytes=20_000)
    train_a_little(stages)
    out = export(shards_of(stages), source, tmp_path / "out")
    assert [f.name for f in sorted(out.glob("model*"))] == ["model.safetensors"]
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(IDS).logits, logits_of(stages))


def test_a_model_that_is_still_tied_stays_tied(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("qwen2-tied")
    shards = shards_of(stages_of(source, 1))
    del shards[0]["lm_head.weight"]
    out = export(shards, source, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(out / "model.safetensors")


def test_views_are_written_without_their_base(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("llama")
    shards = shards_of(stages_of(source, 1))
    shards[0]["model.norm.weight"] = torch.zeros(1000, 32)[5]
    shards[0]["lm_head.weight"] = shards[0]["model.embed_tokens.weight"]  # two names, one storage
    out = export(shards, source, tmp_path / "out")
    assert (out / "model.safetensors").stat().st_size < (source / "model.safetensors").stat().st_size + 10_000


def test_what_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("llama")
    shards = shards_of(stages_of(source))

    def refused(says: str, given: list[dict[str, Any]], to: Path = tmp_path / "out") -> None:
        with pytest.raises(ModelError, match=says) as caught:
            export(given, source, to)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    refused("got the source directory", shards, source)
    refused(r"\d+ tensors missing .* 0 unknown", shards[:1])
    refused("it in two shards", [*shards, shards[1]])
    refused(r"1 unknown \['extra'\]", [*shards, {"extra": torch.zeros(1)}])
    refused(r"got \[2\], wanted \[32\]", [shards[0], {**shards[1], "model.norm.weight": torch.zeros(2)}])
    refused("wanted one dtype", [shards[0], {n: p.bfloat16() for n, p in shards[1].items()}])
    blocked = tmp_path / "file"
    blocked.write_text("")
    refused("a writable directory", shards, blocked)
