"""One stage's part of a checkpoint: a single safetensors file with weights, optimizer, bases and batch, and its metadata.

Written to a temporary name, synced and renamed, so that a shard is whole or absent. The index over all shards and the
marker that makes a checkpoint complete are the anchor's (anchor_node/checkpoints.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swarm_core.errors import UserError
from swarm_core.run_folder import CHECKPOINT_INDEX, CHECKPOINTS, checkpoint_name, shard_name
from swarm_core.wire.messages import Saved


class ShardError(UserError):
    """A shard is missing, damaged or of another run; the message says which file and what to do."""


@dataclass(frozen=True)
class Shard:
    """Tensors under dotted names (`model.`..., `optimizer.`..., `basis.`..., `batch.`...) and a JSON document."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def write_shard(path: Path, shard: Shard) -> tuple[str, int]:
    """Write atomically; returns (sha256 of the file, its size in bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.tensors.items()}
    save_file(tensors, temporary, metadata={"kedge": json.dumps(shard.meta, sort_keys=True)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = os.fstat(file.fileno()).st_size
    temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    return digest, size


class ShardWriter:
    """Writes one stage's shards below a run folder, each tick's once."""

    def __init__(
        self, out: Path, stage: int, stages: int, manifest_digest: str, newest: Saved | None, keep: int = 0
    ) -> None:
        """`newest` is the shard that a resumed run started from; of older ones `keep` stay (0: all)."""
        self._folder = out / CHECKPOINTS
        self._file = shard_name(stage, stages)
        self._digest = manifest_digest
        self._newest = newest
        self.keep = keep

    def write(self, tick: int, make: Callable[[], Shard]) -> Saved:
        """Write the shard of this tick. One that is there already stays: rewriting would tear a complete checkpoint."""
        if self._newest is None or self._newest.tick != tick:
            name, shard = checkpoint_name(tick), make()
            shard.meta["manifest_digest"] = self._digest
            digest, size = write_shard(self._folder / name / self._file, shard)
            self._newest = Saved(tick, name, self._file, digest, size)
            self._prune()
        return self._newest

    def _prune(self) -> None:
        """Older shards of this stage go, where no anchor sees to it.

        One more stays than the anchor keeps checkpoints: the newest is not complete before every stage has written its
        own. A folder with an index is the anchor's, which shares this disk and prunes by itself; names above the
        newest are of a future that a resumed run has left.
        """
        assert self._newest is not None
        names = sorted(path.parent.name for path in self._folder.glob(f"*/{self._file}"))
        past = [name for name in names if name <= self._newest.checkpoint]
        for name in past[: -(self.keep + 1)] if self.keep else []:
            if not (self._folder / name / CHECKPOINT_INDEX).exists():
                (self._folder / name / self._file).unlink()
                with contextlib.suppress(OSError):  # another stage's shard is still there
                    (self._folder / name).rmdir()


def read_shard(path: Path, digest: str = "") -> Shard:
    """Read a shard back; `digest` (when given) must match. Raises ShardError."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if digest and found != digest:
            raise ShardError(f"{path}: sha256 is {found[:12]}..., the index says {digest[:12]}...: the file is damaged")
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["kedge"])
            names = list(file.keys())
            return Shard({name: file.get_tensor(name) for name in names}, meta)
    except FileNotFoundError:
        raise ShardError(
            f"{path}: no such shard; this stage's shard must lie below the worker's --out folder to resume"
        ) from None
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise ShardError(f"{path}: not a readable shard ({error})") from None


def select(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix.`, with the prefix cut off."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}


def clone_all(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, for a snapshot that training must not move under us."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
