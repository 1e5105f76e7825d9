"""What a checkpoint directory says about its model: shape, names, fingerprint. No torch, no tensor is read here."""

from __future__ import annotations

import hashlib
import importlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from swarm_core.errors import UserError

Family = Literal["llama", "qwen2", "qwen3"]
FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "qwen3")
# Rope kinds whose frequencies are a function of the config alone. "dynamic" and "longrope" change theirs with the
# longest sequence seen so far, so a restarted stage would compute other numbers than one that kept running.
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# What a run needs of a hub repository; not the .bin and .gguf copies many of them carry.
HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
HASH_CHUNK_BYTES = 1 << 22
# The safetensors format's own limit: a longer header is damage, and must not be allocated.
MAX_HEADER_BYTES = 100_000_000


class ModelError(UserError):
    """A checkpoint cannot be used. Always one readable line; fields: what, got, wanted, todo."""

    def __init__(self, what: str, got: object, wanted: object, todo: str) -> None:
        line = f"{what}: got {got}, wanted {wanted}; {todo}"
        super().__init__(" ".join(line.split()))
        self.what, self.got, self.wanted, self.todo = what, str(got), str(wanted), todo

    def __reduce__(self) -> tuple[type[ModelError], tuple[str, str, str, str]]:
        return ModelError, (self.what, self.got, self.wanted, self.todo)


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder model that decide tensor shapes and results.

    `hidden` is H, `vocab` is V. `tied` is what the checkpoint says: the run unties at load. `rope` is canonical JSON.
    """

    family: Family
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    attention_bias: bool  # biases on q, k, v
    output_bias: bool  # bias on o
    mlp_bias: bool
    qk_norm: bool
    norm_eps: float
    activation: str
    max_positions: int
    rope: str
    pad_id: int | None
    eos_ids: tuple[int, ...]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a checkpoint's header describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def resolve(name_or_path: str | Path, revision: str | None = None) -> Path:
    """A local checkpoint directory, or a hub repository's snapshot (cache first, then download).

    Raises ModelError naming every place that was looked at.
    """
    text = str(name_or_path)
    local = Path(text).expanduser()
    if text and local.is_dir():
        return local
    if text and local.exists():
        raise ModelError(f"model {text!r}", "a file", "a checkpoint directory", "point at the directory that holds it")
    if text.startswith(("/", ".", "~")) or text.count("/") > 1 or not text:
        raise ModelError(
            f"model {text!r}",
            f"no directory {local.absolute()}" if text else "no directory ''",
            "a checkpoint directory",
            "check the path",
        )
    hub = importlib.import_module("huggingface_hub")
    try:
        return Path(hub.snapshot_download(text, revision=revision, allow_patterns=list(HUB_PATTERNS)))
    except Exception as error:  # the hub client raises a dozen unrelated types (httpx, OSError, its own)
        raise ModelError(
            f"model {text!r}",
            f"no directory {local.absolute()}, nothing usable in the cache {hub.constants.HF_HUB_CACHE}, and from"
            f" {hub.constants.ENDPOINT} {type(error).__name__}: {_first_line(error)}",
            "a local checkpoint directory, or a hub name that can be downloaded",
            "check the name and the network, or pass a directory",
        ) from error


def read_shape(path: str | Path) -> ModelShape:
    """Read `config.json`. Raises ModelError for a missing or damaged file and for what the stages cannot compute."""
    directory = Path(path)
    config = read_json(directory / "config.json", "a checkpoint directory with config.json")
    family = _family(directory, config)
    _refuse_unsupported(directory, config)
    heads = _positive(directory, config, "num_attention_heads")
    hidden = _positive(directory, config, "hidden_size")
    kv_heads = _positive(directory, config, "num_key_value_heads", default=32 if family != "llama" else heads)
    # Qwen3 alone has a default head_dim of its own.
    head_dim = _positive(directory, config, "head_dim", default=128 if family == "qwen3" else hidden // heads)
    if heads % kv_heads:
        raise ModelError(
            f"config {directory / 'config.json'}",
            f"{heads} attention heads over {kv_heads} key-value heads",
            "a multiple",
            "repair num_key_value_heads",
        )
    attention_bias = bool(config.get("attention_bias", False))
    return ModelShape(
        family=family,
        hidden=hidden,
        layers=_positive(directory, config, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=_positive(directory, config, "intermediate_size"),
        vocab=_positive(directory, config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=True if family == "qwen2" else attention_bias,
        output_bias=False if family == "qwen2" else attention_bias,
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        norm_eps=_number(directory, config, "rms_norm_eps", 1e-6),
        activation=str(config.get("hidden_act", "silu")),
        max_positions=_positive(directory, config, "max_position_embeddings", default=2048),
        rope=_rope(directory, config),
        pad_id=_optional_id(directory, config, "pad_token_id"),
        eos_ids=eos_ids(directory),
    )


def hf_config(path: str | Path) -> Any:
    """Transformers' own config object for a directory that `read_shape` accepts."""
    read_shape(path)
    transformers = importlib.import_module("transformers")
    try:
        return transformers.AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # strict dataclass errors, rope validation and more, by version
        raise ModelError(
            f"config {Path(path) / 'config.json'}",
            f"{type(error).__name__}: {_first_line(error)}",
            f"a config that transformers {transformers.__version__} reads",
            "repair the config or install the transformers version it was written by",
        ) from error


def eos_ids(path: str | Path) -> tuple[int, ...]:
    """The ids that end a completion: from generation_config.json, else config.json; empty when neither names one."""
    directory = Path(path)
    for name in ("generation_config.json", "config.json"):
        if not (directory / name).is_file():
            continue
        value = read_json(directory / name, "readable JSON").get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
            raise ModelError(f"eos_token_id in {directory / name}", value, "a token id or a list of them", "repair it")
        if ids:
            return tuple(ids)
    return ()


def tensor_index(path: str | Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors checkpoint from the files' headers: name -> file, dtype, shape.

    Raises ModelError for missing, damaged or truncated files and for an index that disagrees with them.
    """
    directory = Path(path)
    if (directory / SINGLE_FILE).is_file():
        return _read_header(directory / SINGLE_FILE)
    if not (directory / INDEX_FILE).is_file():
        weights = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".safetensors", ".gguf", ".pth"))
        raise ModelError(
            f"checkpoint {directory}",
            f"no weights but {', '.join(weights)}" if weights else "no weights",
            f"{SINGLE_FILE} or {INDEX_FILE}",
            "convert it with save_pretrained (safetensors)" if weights else "copy the weights there",
        )
    mapping = read_json(directory / INDEX_FILE, "a safetensors index").get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(f, str) and Path(f).name == f for f in mapping.values()):
        raise ModelError(
            f"index {directory / INDEX_FILE}", "no usable weight_map", "tensor name -> file name", "copy it again"
        )
    headers = {name: _read_header(directory / name) for name in sorted(set(mapping.values()))}
    for tensor, name in mapping.items():
        if tensor not in headers[name]:
            raise ModelError(
                f"tensor {tensor}", f"not in {directory / name}", f"what {INDEX_FILE} says", "copy both again"
            )
    return {tensor: headers[name][tensor] for tensor, name in mapping.items()}


def fingerprint(path: str | Path) -> str:
    """Hex sha256 over the shape, every tensor's name, dtype and shape, and every weight file's size and sha256.

    Two processes with equal fingerprints start from the same numbers. Reads all weights once (about 1 GB/s).
    """
    directory = Path(path)
    index = tensor_index(directory)
    digest = hashlib.sha256(json.dumps(asdict(read_shape(directory)), sort_keys=True).encode())
    for name in sorted(index):
        digest.update(f"\n{name} {index[name].dtype} {list(index[name].shape)}".encode())
    for file in sorted({info.file for info in index.values()}):
        content = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(HASH_CHUNK_BYTES):
                content.update(chunk)
        digest.update(f"\n{file.name} {file.stat().st_size} {content.hexdigest()}".encode())
    return digest.hexdigest()


def read_json(file: Path, wanted: str) -> dict[str, Any]:
    """A JSON object from a file, or a ModelError that names the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"file {file}", "no such file", wanted, "check the path or download it again") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"file {file}", _first_line(error), wanted, "download it again") from error
    if not isinstance(value, dict):
        raise ModelError(
            f"file {file}", f"a JSON {type(value).__name__}", f"{wanted} (a JSON object)", "download it again"
        )
    return cast(dict[str, Any], value)


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """Parse a safetensors header (8 byte length, JSON) and check that the file has every byte it announces."""
    again = "download or copy the file again"
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise ModelError(f"weights {file}", f"{size} bytes", "a whole safetensors header", again)
            header = json.loads(stream.read(length))
        infos, end = {}, 0
        for name, entry in header.items():
            if name != "__metadata__":
                infos[name] = TensorInfo(file, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
                end = max(end, int(entry["data_offsets"][1]))
    except FileNotFoundError as error:
        raise ModelError(f"weights {file}", "no such file", "a safetensors file", again) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"weights {file}", f"a damaged header ({_first_line(error)})", "safetensors", again) from error
    if size != 8 + length + end:
        raise ModelError(f"weights {file}", f"{size} bytes", f"{8 + length + end} bytes by its header", again)
    return infos


def _family(directory: Path, config: Mapping[str, Any]) -> Family:
    for family in FAMILIES:
        if config.get("model_type") == family:
            return family
    raise ModelError(
        f"config {directory / 'config.json'}",
        f"model_type {config.get('model_type')!r}",
        " or ".join(FAMILIES),
        "choose a model of one of these families",
    )


def _refuse_unsupported(directory: Path, config: Mapping[str, Any]) -> None:
    where = f"config {directory / 'config.json'}"
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    windowed = bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None
    if kinds or windowed:
        raise ModelError(
            where,
            f"layer types {sorted(kinds)}" if kinds else f"sliding_window {config['sliding_window']}",
            "full causal attention in every layer (sliding-window attention is not supported)",
            "choose another model, or set use_sliding_window to false if the window is never reached",
        )
    if config.get("quantization_config") is not None:
        raise ModelError(
            where, "quantization_config", "unquantized weights", "choose the bf16 release of this model; it is trained"
        )


def _rope(directory: Path, config: Mapping[str, Any]) -> str:
    """Both spellings (rope_parameters of transformers 5; rope_theta + rope_scaling before) in one canonical form."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ModelError(f"config {directory / 'config.json'}", f"rope {given!r}", "an object", "repair the config")
    rope = dict(given)
    legacy = rope.pop("type", "default")
    rope.setdefault("rope_type", legacy)
    rope.setdefault("rope_theta", config.get("rope_theta"))
    rope["rope_theta"] = _number(directory, rope, "rope_theta", 10_000.0)
    if rope["rope_type"] not in ROPE_TYPES:
        raise ModelError(
            f"config {directory / 'config.json'}",
            f"rope_type {rope['rope_type']!r}",
            " or ".join(ROPE_TYPES),
            "choose another model: frequencies that depend on past lengths cannot be replayed",
        )
    return json.dumps(rope, sort_keys=True)


def _positive(directory: Path, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(
            f"{key} in {directory / 'config.json'}",
            "nothing" if value is None else repr(value),
            "a whole number >= 1",
            "repair the config or download it again",
        )
    return value


def _number(directory: Path, config: Mapping[str, Any], key: str, default: float) -> float:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ModelError(f"{key} in {directory / 'config.json'}", repr(value), "a number > 0", "repair the config")
    return float(value)


def _optional_id(directory: Path, config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise ModelError(
            f"{key} in {directory / 'config.json'}", repr(value), "a token id or null", "repair the config"
        )
    return value


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
