"""Tiny random checkpoints of every family, written the way transformers writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 53,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}


def _config(name: str) -> Any:
    if name == "llama":
        return LlamaConfig(**COMMON, num_key_value_heads=4, tie_word_embeddings=False)
    if name == "llama-biased":
        return LlamaConfig(**COMMON, num_key_value_heads=1, attention_bias=True, mlp_bias=True)
    if name == "qwen2-tied":
        return Qwen2Config(**COMMON, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0)
    assert name == "qwen3"
    return Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """checkpoint(name, **save_pretrained options) -> directory."""

    def make(name: str, **options: Any) -> Path:
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(_config(name))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        directory = tmp_path / name
        model.save_pretrained(directory, **options)
        return directory

    return make
