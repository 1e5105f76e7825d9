"""The shipped tiny example is what its build script says it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from swarm_core.data.dataset import load_rows
from swarm_core.data.prompts import completion_text, encode_prompt
from swarm_core.models.reading import load_tokenizer
from swarm_worker.sampler.hf import HfEngine

TINY = Path(__file__).parents[3] / "examples" / "tiny"


def test_the_model_is_small_and_complete() -> None:
    assert sum(file.stat().st_size for file in (TINY / "model").iterdir()) < 2_000_000
    config = json.loads((TINY / "model" / "config.json").read_text())
    shape = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
    assert [config[name] for name in shape] == ["qwen2", 6, 96, 4, 2]
    assert config["tie_word_embeddings"] is True
    with safe_open(TINY / "model" / "model.safetensors", "pt") as tensors:
        assert "lm_head.weight" not in set(tensors.keys())
        assert tensors.get_tensor("model.norm.weight").dtype == torch.bfloat16
    generation = json.loads((TINY / "model" / "generation_config.json").read_text())
    tokenizer = load_tokenizer(TINY / "model")
    assert tokenizer.convert_ids_to_tokens([generation["eos_token_id"], generation["pad_token_id"]]) == [
        "<eos>",
        "<pad>",
    ]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pad>")


def test_the_tokenizer_reads_characters_by_every_way_of_loading_it() -> None:
    tokenizers = [load_tokenizer(TINY / "model"), PreTrainedTokenizerFast.from_pretrained(TINY / "model")]
    for tokenizer in tokenizers:
        ids = tokenizer("12+34=46 -*")["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == list("12+34=46\u0120-*")
        assert tokenizer.decode(ids) == "12+34=46 -*"
        assert tokenizer.decode([*ids, 1, 0, 0], skip_special_tokens=True) == "12+34=46 -*"
    raw = Tokenizer.from_file(str(TINY / "model" / "tokenizer.json"))
    assert raw.encode("12+34=46 -*").ids == tokenizers[0]("12+34=46 -*")["input_ids"]


def test_the_data_is_right_and_kept_apart() -> None:
    train, validation = load_rows(TINY / "data" / "train.jsonl"), load_rows(TINY / "data" / "validation.jsonl")
    assert (len(train), len(validation)) == (3000, 500)

    def pairs(rows: list) -> list[tuple[int, int]]:  # type: ignore[type-arg]
        numbers = []
        for row in rows:
            a, b = map(int, row.prompt.removesuffix("=").split("+"))
            assert 10 <= a <= 99 and 10 <= b <= 99 and row.answer == str(a + b)
            numbers.append((a, b))
        assert len(set(numbers)) == len(numbers)
        return numbers

    turned = {(min(pair), max(pair)) for pair in pairs(train)}
    assert not turned & {(min(pair), max(pair)) for pair in pairs(validation)}


def test_the_data_is_rebuilt_by_its_script(tmp_path: Path) -> None:
    command = [sys.executable, str(TINY / "build.py"), "--data-only", "--to", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / "data" / name).read_bytes() == (TINY / "data" / name).read_bytes()


def test_it_is_right_about_half_of_the_time() -> None:
    engine, tokenizer = HfEngine(TINY / "model"), load_tokenizer(TINY / "model")
    rows = load_rows(TINY / "data" / "validation.jsonl")
    prompts = [encode_prompt(tokenizer, row.prompt) for row in rows]

    def accuracy(temperature: float) -> float:
        done = engine.generate(prompts, 1, temperature, 8, seed=0)
        return sum(completion_text(tokenizer, g.completion_ids) == rows[g.prompt_index].answer for g in done) / 500

    assert 0.45 <= accuracy(1.0) <= 0.58
    assert accuracy(0.0) > 0.98
