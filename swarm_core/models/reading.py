"""Tensors out of safetensors, one stage's and no other's; the tokenizer. No training state, no export."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from swarm_core.learning.partition import Span
from swarm_core.learning.stage import Stage, build_stage
from swarm_core.models.architecture import ModelError, ModelShape, TensorInfo, hf_config, read_shape, tensor_index

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
# Element types a stage can be built from; integer and fp8 tensors are quantized weights without their scales.
FLOAT_TYPES = ("F64", "F32", "BF16", "F16")


def tensor_shapes(shape: ModelShape, span: Span) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a stage's tensors, in the order of transformers' `named_parameters()`.

    The last stage always has its own `lm_head.weight`, in a tied model too.
    """
    if span.last_layer > shape.layers or (span.is_last and span.last_layer != shape.layers):
        raise ModelError(
            f"stage {span.stage} of {span.stages}",
            f"layers {span.first_layer}..{span.last_layer - 1}",
            f"a cut of the model's {shape.layers} layers",
            "build spans with partition() from this model's shape",
        )
    wanted: dict[str, tuple[int, ...]] = {}
    if span.is_first:
        wanted[EMBEDDING] = (shape.vocab, shape.hidden)
    for layer in span.layers:
        wanted.update({f"model.layers.{layer}.{name}": dims for name, dims in _layer_shapes(shape).items()})
    if span.is_last:
        wanted[FINAL_NORM] = (shape.hidden,)
        wanted[HEAD] = (shape.vocab, shape.hidden)
    return wanted


def tensor_names(shape: ModelShape, span: Span) -> list[str]:
    """Names of a stage's tensors, in the order of transformers' `named_parameters()`."""
    return list(tensor_shapes(shape, span))


def load_stage(path: str | Path, span: Span, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Read exactly the tensors of `span`, converted to `dtype`, each in memory of its own.

    In a tied model the last stage's `lm_head.weight` is a copy of the embedding: the run trains the two ends apart.
    Raises ModelError (missing or damaged file, missing tensor, wrong shape, quantized weights).
    """
    shape = read_shape(path)
    wanted = tensor_shapes(shape, span)
    index = tensor_index(path)
    _refuse_deeper_checkpoint(path, shape, index)
    # A tied checkpoint may still carry an lm_head; transformers ignores it, so it is ignored here.
    sources = {name: EMBEDDING if name == HEAD and shape.tied else name for name in wanted}
    for name, source in sources.items():
        _check_tensor(path, source, wanted[name], index)
    state: dict[str, Tensor] = {}
    for file in sorted({index[source].file for source in sources.values()}):
        here = [name for name, source in sources.items() if index[source].file == file]
        try:
            with safe_open(str(file), framework="pt", device="cpu") as opened:
                for name in here:
                    # copy: safetensors hands out views of the mapped file, which would keep (and later fault on) it.
                    state[name] = opened.get_tensor(sources[name]).to(dtype, copy=True)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"weights {file}", error, "safetensors", "download or copy the file again") from error
    return {name: state[name] for name in wanted}


def open_stage(path: str | Path, span: Span, dtype: torch.dtype = torch.float32, *, recompute: bool = False) -> Stage:
    """A stage with its weights, ready to train: config, tensors and `build_stage` in one call."""
    return build_stage(hf_config(path), span, load_stage(path, span, dtype), dtype, recompute=recompute)


def stage_with(path: str | Path, span: Span, weights: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Stage:
    """A stage of that checkpoint's architecture with these weights, in the order of `tensor_shapes`."""
    names = tensor_names(read_shape(path), span)
    named = {name: tensor.to(dtype) for name, tensor in zip(names, weights, strict=True)}
    return build_stage(hf_config(path), span, named, dtype)


def load_tokenizer(path: str | Path) -> Any:
    """The directory's tokenizer (transformers' AutoTokenizer). Raises ModelError when there is none."""
    transformers = importlib.import_module("transformers")
    if not Path(path).is_dir():
        raise ModelError(f"tokenizer in {path}", "no such directory", "a checkpoint directory", "check the path")
    try:
        found = transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        if found.vocab_size < 2:  # of a config alone transformers makes one that has an end token and no word
            raise ValueError("no vocabulary")
        return found
    except Exception as error:  # ValueError, OSError, KeyError or the Rust tokenizer's bare Exception, by file
        raise ModelError(
            f"tokenizer in {path}",
            f"{type(error).__name__}: {str(error)[:300]}",
            "tokenizer.json or the family's vocabulary files",
            "copy the tokenizer files of the model there",
        ) from error


def _layer_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """One decoder layer, in the order in which transformers registers its parameters."""
    heads_out, kv_out = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    linears = [
        ("self_attn.q_proj", (heads_out, shape.hidden), shape.attention_bias),
        ("self_attn.k_proj", (kv_out, shape.hidden), shape.attention_bias),
        ("self_attn.v_proj", (kv_out, shape.hidden), shape.attention_bias),
        ("self_attn.o_proj", (shape.hidden, heads_out), shape.output_bias),
        ("mlp.gate_proj", (shape.intermediate, shape.hidden), shape.mlp_bias),
        ("mlp.up_proj", (shape.intermediate, shape.hidden), shape.mlp_bias),
        ("mlp.down_proj", (shape.hidden, shape.intermediate), shape.mlp_bias),
    ]
    found: dict[str, tuple[int, ...]] = {}
    for name, dims, bias in linears:
        found[f"{name}.weight"] = dims
        if bias:
            found[f"{name}.bias"] = dims[:1]
        if name == "self_attn.o_proj" and shape.qk_norm:
            found["self_attn.q_norm.weight"] = (shape.head_dim,)
            found["self_attn.k_norm.weight"] = (shape.head_dim,)
    found["input_layernorm.weight"] = (shape.hidden,)
    found["post_attention_layernorm.weight"] = (shape.hidden,)
    return found


def _check_tensor(path: str | Path, name: str, dims: tuple[int, ...], index: dict[str, TensorInfo]) -> None:
    info = index.get(name)
    if info is None:
        near = "the same name without 'model.'" if name.removeprefix("model.") in index else f"{len(index)} others"
        raise ModelError(
            f"tensor {name} in {path}", f"no such tensor ({near})", f"shape {list(dims)}", "save the whole CausalLM"
        )
    if info.shape != dims:
        raise ModelError(
            f"tensor {name} in {info.file}",
            f"shape {list(info.shape)}",
            f"{list(dims)} by config.json",
            "use the config.json that belongs to these weights",
        )
    if info.dtype not in FLOAT_TYPES:
        raise ModelError(
            f"tensor {name} in {info.file}", f"dtype {info.dtype}", " or ".join(FLOAT_TYPES), "use unquantized weights"
        )


def _refuse_deeper_checkpoint(path: str | Path, shape: ModelShape, index: dict[str, TensorInfo]) -> None:
    """A config with too few layers would otherwise load, train and export a silently shortened model."""
    parts = [name.split(".") for name in index if name.startswith("model.layers.")]
    deepest = max((int(part[2]) for part in parts if part[2].isdigit()), default=-1)
    if deepest >= shape.layers:
        raise ModelError(
            f"checkpoint {path}",
            f"layers up to {deepest}",
            f"{shape.layers} layers (0..{shape.layers - 1}) by config.json",
            "use the config.json that belongs to these weights",
        )
