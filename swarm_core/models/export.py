"""Trained shards back into a directory that transformers loads: all of it, or what goes beside the files that the stages write
themselves. No reading of training state, no upload.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from swarm_core.learning.partition import Span, whole
from swarm_core.models.architecture import INDEX_FILE, SINGLE_FILE, ModelError, ModelShape, read_json, read_shape
from swarm_core.models.reading import HEAD, tensor_shapes
from swarm_core.run_folder import hf_name

# Everything a tokenizer of the three families may consist of, and the sampling defaults. Nothing else is copied: not
# the old weights, their index, or a model card that describes them.
COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
MAX_SHARD_BYTES = 5_000_000_000  # what save_pretrained used for years; fits every host that can hold a stage


def export(
    shards: Sequence[Mapping[str, Tensor]],
    src_dir: str | Path,
    to_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the stages' tensors, `src_dir`'s config and its tokenizer files to `to_dir`; return that path.

    The shards together must be the whole model under its checkpoint names (any order, no name twice). The config says
    `tie_word_embeddings: false` when the shards hold an lm_head of their own, and the dtype that was written: `dtype`,
    or the shards' own. Weights are complete under their final names before config.json appears, so a directory with a
    config is a whole one. Raises ModelError (missing, unknown, doubled or misshapen tensor; src is to).
    """
    source, target = Path(src_dir), Path(to_dir)
    if source.resolve() == target.resolve():
        raise ModelError(f"export to {target}", "the source directory", "another one", "choose a new directory")
    shape = read_shape(source)
    tied, tensors = _collect(shards, shape)
    written = dtype or _common_dtype(tensors)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for stale in (*target.glob("model*.safetensors"), target / INDEX_FILE, target / "config.json"):
            stale.unlink(missing_ok=True)
        _write_weights(tensors, target, written, max_shard_bytes)
        _describe(source, target, tied, written)
    except OSError as error:
        raise ModelError(f"export to {target}", error, "a writable directory with room", "free space there") from error
    return target


def describe_parts(spans: Sequence[Span], src_dir: str | Path, to_dir: str | Path, dtype: torch.dtype) -> None:
    """Write what makes a model of the files that the stages write below `to_dir`: index, config, tokenizer.

    No file of a stage need be there yet, or ever: they may lie with their stages. Raises ModelError.
    """
    source, target = Path(src_dir), Path(to_dir)
    shape = read_shape(source)
    weight_map, size = {}, 0
    for span in spans:
        for name, dims in tensor_shapes(shape, span).items():
            weight_map[name] = hf_name(span.stage, span.stages)
            size += math.prod(dims) * dtype.itemsize
    try:
        target.mkdir(parents=True, exist_ok=True)
        _write_index(target, weight_map, size)
        _describe(source, target, tied=False, dtype=dtype)  # the last stage has a head of its own, in a tied model too
    except OSError as error:
        raise ModelError(f"a model in {target}", error, "a writable directory with room", "free space there") from error


def own_names(names: Iterable[str]) -> list[str]:
    """Of the tensors of a shard the model's own, under their checkpoint names; not the optimizer's, or a batch's."""
    return [name for name in names if name.startswith("model.") or name == HEAD]


def _describe(source: Path, target: Path, tied: bool, dtype: torch.dtype) -> None:
    """Tokenizer, generation defaults and, last, the config."""
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    config = read_json(source / "config.json", "the source's config")
    config["tie_word_embeddings"] = tied
    config["dtype"] = str(dtype).removeprefix("torch.")
    if "torch_dtype" in config:  # transformers 4 and older vLLM read this spelling
        config["torch_dtype"] = config["dtype"]
    _write_json(config, target / "config.json")


def _write_index(target: Path, weight_map: Mapping[str, str], size: int) -> None:
    _write_json({"metadata": {"total_size": size}, "weight_map": weight_map}, target / INDEX_FILE)


def _collect(shards: Sequence[Mapping[str, Tensor]], shape: ModelShape) -> tuple[bool, dict[str, Tensor]]:
    """(still tied, all tensors in checkpoint order), checked against the model's own list."""
    merged: dict[str, Tensor] = {}
    for shard in shards:
        for name, tensor in shard.items():
            if name in merged:
                raise ModelError(f"tensor {name}", "it in two shards", "it in one", "pass one replica of each stage")
            merged[name] = tensor
    wanted = tensor_shapes(shape, whole(shape))
    tied = shape.tied and HEAD not in merged
    if tied:
        del wanted[HEAD]
    missing, unknown = [n for n in wanted if n not in merged], [n for n in merged if n not in wanted]
    if missing or unknown:
        raise ModelError(
            "shards",
            f"{len(missing)} tensors missing {missing[:3]} and {len(unknown)} unknown {unknown[:3]}",
            f"the model's {len(wanted)} tensors",
            "pass the shards of all stages, under checkpoint names",
        )
    for name, dims in wanted.items():
        if tuple(merged[name].shape) != dims:
            raise ModelError(f"tensor {name}", list(merged[name].shape), list(dims), "pass the shards of this model")
    return tied, {name: merged[name] for name in wanted}


def _common_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    found = {tensor.dtype for tensor in tensors.values()}
    if len(found) != 1:
        raise ModelError("shards", f"dtypes {sorted(map(str, found))}", "one dtype", "pass dtype= to convert")
    return found.pop()


def _write_weights(tensors: Mapping[str, Tensor], target: Path, dtype: torch.dtype, max_bytes: int) -> None:
    groups = list(_groups(tensors, dtype.itemsize, max_bytes))
    total, weight_map = len(groups), {}
    for number, names in enumerate(groups, start=1):
        file = SINGLE_FILE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
        ready: dict[str, Tensor] = {}
        for name in names:
            tensor = tensors[name].detach().to("cpu", dtype).contiguous()
            # safetensors refuses two names on one storage (views of one buffer, a head tied to its embedding).
            own = tensor.untyped_storage().nbytes() == tensor.nbytes and not _shares(tensor, ready)
            ready[name] = tensor if own else tensor.clone()
        save_file(ready, str(target / (file + ".part")), metadata={"format": "pt"})
        _settle(target / (file + ".part"), target / file)
        weight_map.update(dict.fromkeys(names, file))
    if total > 1:
        size = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
        _write_index(target, weight_map, size)


def _shares(tensor: Tensor, others: Mapping[str, Tensor]) -> bool:
    pointer = tensor.untyped_storage().data_ptr()
    return any(other.untyped_storage().data_ptr() == pointer for other in others.values())


def _groups(tensors: Mapping[str, Tensor], itemsize: int, max_bytes: int) -> Iterator[list[str]]:
    """Names in order, cut where the next tensor would pass the limit; a larger tensor gets a file of its own."""
    group: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if group and size + tensor.numel() * itemsize > max_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += tensor.numel() * itemsize
    if group:
        yield group


def _write_json(value: Mapping[str, object], file: Path) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _settle(part, file)


def _settle(part: Path, file: Path) -> None:
    """Durable under the final name, or not there at all."""
    with part.open("rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(part, file)
