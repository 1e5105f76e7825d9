"""What config.json and the headers say, and what is refused in one readable line."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from swarm_core.models.architecture import (
    ModelError,
    ModelShape,
    eos_ids,
    fingerprint,
    hf_config,
    read_shape,
    resolve,
    tensor_index,
)

Make = Callable[..., Path]


def edit(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    for key, value in changes.items():
        if value is ...:
            config.pop(key, None)
        else:
            config[key] = value
    (path / "config.json").write_text(json.dumps(config))


def test_shapes(checkpoint: Make) -> None:
    llama, qwen2, qwen3 = (read_shape(checkpoint(n)) for n in ("llama-biased", "qwen2-tied", "qwen3"))
    assert llama == ModelShape(
        family="llama",
        hidden=32,
        layers=4,
        heads=4,
        kv_heads=1,
        head_dim=8,
        intermediate=56,
        vocab=53,
        tied=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        qk_norm=False,
        norm_eps=1e-6,
        activation="silu",
        max_positions=128,
        rope='{"rope_theta": 10000.0, "rope_type": "default"}',
        pad_id=None,
        eos_ids=(2,),
    )
    assert (qwen2.family, qwen2.tied, qwen2.attention_bias, qwen2.output_bias) == ("qwen2", True, True, False)
    assert (qwen2.head_dim, qwen2.pad_id, qwen2.qk_norm) == (8, 0, False)
    assert (qwen3.family, qwen3.qk_norm, qwen3.head_dim, qwen3.attention_bias) == ("qwen3", True, 16, False)


@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen2-tied", "qwen3"])
def test_defaults_of_keys_left_out_are_those_of_transformers(checkpoint: Make, name: str) -> None:
    path = checkpoint(name)
    for key in ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "hidden_act",
                "tie_word_embeddings", "rope_parameters", "attention_bias", "mlp_bias", "pad_token_id"):  # fmt: skip
        edit(path, num_attention_heads=32, hidden_size=64, **{key: ...})
        shape, config = read_shape(path), hf_config(path)
        assert shape.kv_heads == config.num_key_value_heads
        assert shape.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // 32)
        assert shape.norm_eps == config.rms_norm_eps
        assert shape.max_positions == config.max_position_embeddings or name.startswith("qwen")
        assert shape.activation == config.hidden_act
        assert shape.tied == config.tie_word_embeddings
        assert json.loads(shape.rope)["rope_theta"] == config.rope_parameters["rope_theta"]
        assert shape.pad_id == config.pad_token_id


def test_both_spellings_of_rope_mean_the_same(checkpoint: Make) -> None:
    path = checkpoint("llama")
    edit(path, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    new = read_shape(path)
    edit(path, rope_parameters=..., rope_theta=500000, rope_scaling={"type": "linear", "factor": 2.0})
    assert read_shape(path) == new
    assert hf_config(path).rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "mistral"}, "got model_type 'mistral', wanted llama or qwen2 or qwen3"),
        ({"model_type": ...}, "model_type None"),
        ({"use_sliding_window": True, "sliding_window": 16}, "sliding_window 16, wanted full causal attention"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, r"layer types \['sliding_attention'\]"),
        ({"quantization_config": {"bits": 4}}, "wanted unquantized weights"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_parameters": ...}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ({"rope_parameters": [1]}, "an object"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta in .* 'big', wanted a number > 0"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
        ({"pad_token_id": "<pad>"}, "a token id or null"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"hidden_size": ...}, "hidden_size in .*config.json: got nothing, wanted a whole number >= 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers in .* got 0"),
        ({"vocab_size": True}, "vocab_size in .* got True"),
        ({"num_key_value_heads": 3}, "4 attention heads over 3 key-value heads"),
    ],
)
def test_configs_that_are_refused(checkpoint: Make, changes: dict[str, Any], says: str) -> None:
    path = checkpoint("qwen2-tied")
    (path / "generation_config.json").unlink()
    edit(path, **changes)
    with pytest.raises(ModelError, match=says) as caught:
        read_shape(path)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff", None])
def test_a_missing_or_broken_config(checkpoint: Make, content: str | None) -> None:
    path = checkpoint("llama")
    file = path / "config.json"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match="config.json: got .*wanted a checkpoint directory") as caught:
        read_shape(path)
    assert "\n" not in str(caught.value)


def test_ends_of_a_completion(checkpoint: Make) -> None:
    path = checkpoint("llama")
    (path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert eos_ids(path) == (7, 2)
    assert read_shape(path).eos_ids == (7, 2)
    (path / "generation_config.json").write_text("{}")
    assert eos_ids(path) == (2,)
    edit(path, eos_token_id=None)
    assert eos_ids(path) == ()


def test_fingerprints(checkpoint: Make, tmp_path: Path) -> None:
    path = checkpoint("llama")
    first = fingerprint(path)
    assert len(first) == 64 and fingerprint(path) == first
    edit(path, transformers_version="4.0.0", dtype="bfloat16", _name_or_path="elsewhere")
    assert fingerprint(path) == first, "keys that change no number do not count"
    edit(path, rms_norm_eps=1e-5)
    assert fingerprint(path) != first
    edit(path, rms_norm_eps=1e-6)
    assert fingerprint(path) == first
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(path) != first


def test_the_index_agrees_with_safetensors(checkpoint: Make) -> None:
    path = checkpoint("qwen3", max_shard_size="20KB")
    want = {n: t for f in path.glob("*.safetensors") for n, t in load_file(f).items()}
    got = tensor_index(path)
    assert {n: i.shape for n, i in got.items()} == {n: tuple(t.shape) for n, t in want.items()}
    assert {i.dtype for i in got.values()} == {"F32"}


def test_a_directory_resolves_to_itself(checkpoint: Make, tmp_path: Path) -> None:
    path = checkpoint("llama")
    assert resolve(path) == resolve(str(path)) == path
    for wrong in (tmp_path / "nowhere", "./nowhere", "a/b/c", ""):
        with pytest.raises(ModelError, match="got no directory .*; check the path"):
            resolve(wrong)
    with pytest.raises(ModelError, match="a checkpoint directory"):
        resolve(path / "config.json")


def test_a_hub_name_is_downloaded_by_the_hub_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("Qwen/Qwen2.5-0.5B", revision="abc") == tmp_path
    assert (asked["repo_id"], asked["revision"]) == ("Qwen/Qwen2.5-0.5B", "abc")
    assert "*.safetensors" in asked["allow_patterns"] and "*.bin" not in asked["allow_patterns"]


def test_a_hub_that_cannot_be_reached_is_one_line_with_every_place(tmp_path: Path) -> None:
    """The real client, against a port where nothing listens."""
    code = (
        "from swarm_core.models.architecture import resolve, ModelError\n"
        "try: resolve('Qwen/Qwen2.5-0.5B')\n"
        "except ModelError as error: print(error)\n"
        "import sys; assert 'torch' not in sys.modules\n"
    )
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    env.pop("HF_HUB_CACHE", None)
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.strip().splitlines()
    assert line.startswith("model 'Qwen/Qwen2.5-0.5B': got no directory ")
    assert str(Path.cwd() / "Qwen/Qwen2.5-0.5B") in line
    assert str(tmp_path / "hub") in line and "http://127.0.0.1:9" in line
    assert line.endswith("check the name and the network, or pass a directory")


def test_errors_cross_a_process_boundary() -> None:
    error = ModelError("tensor x", [1, 2], (3,), "copy\nit again")
    assert str(error) == "tensor x: got [1, 2], wanted (3,); copy it again"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
