"""One stage's part of a checkpoint: a single safetensors file with weights, optimizer, bases and batch, and its metadata.

Written to a temporary name, synced and renamed, so that a shard is whole or absent. The index over all shards and the
marker that makes a checkpoint complete are the anchor's (anchor_node/checkpoints.py).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swarm_core.durable import sync
from swarm_core.errors import UserError
from swarm_core.models.export import own_names
from swarm_core.run_folder import CHECKPOINT_INDEX, CHECKPOINTS, HF, MOST_LOST, checkpoint_name, hf_name, shard_name
from swarm_core.wire.messages import Saved
from swarm_worker import failpoints


class ShardError(UserError):
    """A shard is missing, damaged or of another run; the message says which file and what to do."""


@dataclass(frozen=True)
class Shard:
    """Tensors under dotted names (`model.`..., `optimizer.`..., `basis.`..., `batch.`...) and a JSON document."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def write_shard(path: Path, shard: Shard) -> tuple[str, int]:
    """Write atomically; returns (sha256 of the file, its size in bytes)."""
    metadata = {"kedge": json.dumps(shard.meta, sort_keys=True)}
    with _written(path, shard.tensors, metadata) as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size


def write_layers(path: Path, shard: Shard) -> None:
    """The model's own tensors of a shard, as transformers reads them; atomically, too."""
    with _written(path, {name: shard.tensors[name] for name in own_names(shard.tensors)}, {"format": "pt"}):
        pass


@contextlib.contextmanager
def _written(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Iterator[BinaryIO]:
    """A file with these tensors, all of it on disk; it gets its name when whoever reads it has done so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(ready, temporary, metadata=metadata)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
        yield file
    temporary.rename(path)
    sync(path.parent)


class ShardWriter:
    """Writes one stage's shards below a run folder, on whatever thread calls it; one call at a time."""

    def __init__(
        self, out: Path, stage: int, stages: int, manifest_digest: str, keep: int = 0, *, hf: bool = False
    ) -> None:
        """Of the shards before the newest `keep` stay (0: all). `hf`: the layers of each are written for transformers, too."""
        self._folder = out / CHECKPOINTS
        self._stage = stage
        self._file = shard_name(stage, stages)
        self._layers = f"{HF}/{hf_name(stage, stages)}" if hf else ""
        self._digest = manifest_digest
        self.keep = keep

    def write(self, tick: int, shard: Shard) -> Saved:
        """Write the shard of this tick. Raises ShardError where it cannot be written."""
        name = checkpoint_name(tick)
        path, layers = self._folder / name / self._file, self._folder / name / self._layers
        shard.meta["manifest_digest"] = self._digest
        try:
            if self._layers:
                write_layers(layers, shard)
            failpoints.hit("saving", self._stage, tick)
            digest, size = write_shard(path, shard)
            failpoints.hit("saved", self._stage, tick)
            self._prune(name)
        except (OSError, SafetensorError) as error:
            for torn in (path, layers):
                with contextlib.suppress(OSError):
                    torn.with_suffix(".tmp").unlink()
            raise ShardError(
                f"{path} cannot be written ({error}): make room there, and start this stage again with the same --out"
            ) from None
        return Saved(tick, name, self._file, digest, size)

    def said_again(self, tick: int, digest: str) -> Saved | None:
        """What was said of a shard that is known to be whole, if it is still there."""
        name = checkpoint_name(tick)
        path = self._folder / name / self._file
        return Saved(tick, name, self._file, digest, path.stat().st_size) if path.exists() else None

    def _prune(self, newest: str) -> None:
        """Older shards of this stage go, where no anchor sees to it.

        One more stays than the anchor keeps checkpoints: the newest is not complete before every stage has written its
        own. A folder with an index is the anchor's, which shares this disk and prunes by itself; names above the
        newest are of a future that a resumed run has left.
        """
        names = sorted(path.parent.name for path in self._folder.glob(f"*/{self._file}"))
        past = [name for name in names if name <= newest]
        # As redo.py keeps logs: what reaches MOST_LOST ticks back stays as well.
        reaching = [
            name for name in past if name <= checkpoint_name(max(0, int(newest.removeprefix("tick-")) - MOST_LOST))
        ]
        useless = [name for name in past[: -(self.keep + 1)] if reaching and name < reaching[-1]]
        for name in useless if self.keep else []:
            if not (self._folder / name / CHECKPOINT_INDEX).exists():
                (self._folder / name / self._file).unlink()
                with contextlib.suppress(OSError):  # another stage's shard is still there
                    if self._layers:
                        (self._folder / name / self._layers).unlink(missing_ok=True)
                        (self._folder / name / HF).rmdir()
                    (self._folder / name).rmdir()


def check_shard(path: Path, digest: str) -> None:
    """Whether a shard is there and whole, as far as its sha256 tells. Raises ShardError."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise ShardError(
            f"{path}: no such shard; this stage's shard must lie below the worker's --out folder to resume"
        ) from None
    except OSError as error:
        raise ShardError(f"{path}: not a readable shard ({error})") from None
    if digest and found != digest:
        raise ShardError(f"{path}: sha256 is {found[:12]}..., the index says {digest[:12]}...: the file is damaged")


def read_shard(path: Path, digest: str = "") -> Shard:
    """Read a shard back; `digest` (when given) must match. Raises ShardError."""
    check_shard(path, digest)
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["kedge"])
            names = list(file.keys())
            return Shard({name: file.get_tensor(name) for name in names}, meta)
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise ShardError(f"{path}: not a readable shard ({error})") from None


def select(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix.`, with the prefix cut off."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}


def snapshot(shard: Shard) -> Shard:
    """A copy on the host that nothing moves any more."""
    return Shard(clone_all(shard.tensors), copy.deepcopy(shard.meta))


def clone_all(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, for a snapshot that training must not move under us."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
