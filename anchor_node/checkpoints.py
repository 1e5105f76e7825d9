"""Checkpoint folders as the anchor keeps them: index over the stages' shards, marker last, old ones pruned."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from codec.spec import Direction
from swarm_core.errors import UserError
from swarm_core.run_folder import CHECKPOINTS
from swarm_core.wire.messages import Saved

Key = tuple[int, Direction]
BASES = "bases.safetensors"
log = logging.getLogger(__name__)
MARKER = "COMPLETE"
INDEX = "index.json"


class CheckpointError(UserError):
    """No usable checkpoint; the message says where it was looked for and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    tick: int
    manifest_digest: str
    shards: dict[int, Saved]

    @property
    def name(self) -> str:
        return self.folder.name


def complete(
    out: Path,
    name: str,
    manifest_digest: str,
    shards: dict[int, Saved],
    keep: int,
    bases: tuple[int, dict[Key, Tensor]] | None,
) -> Checkpoint:
    """Write the anchor's own part (`bases`: the newest version), the index, then the marker; then prune.

    All but the newest `keep` complete checkpoints go.
    """
    folder = out / CHECKPOINTS / name
    folder.mkdir(parents=True, exist_ok=True)
    if bases is not None:
        held = bases[1].items()
        tensors = {f"{boundary}.{int(direction)}": q_HR.contiguous() for (boundary, direction), q_HR in held}
        save_file(tensors, folder / BASES, metadata={"version": str(bases[0])})
        _sync(folder / BASES)
    tick = shards[0].tick
    index = {
        "tick": tick,
        "manifest_digest": manifest_digest,
        "stages": len(shards),
        "shards": {str(stage): asdict(saved) for stage, saved in sorted(shards.items())},
    }
    _write_synced(folder / INDEX, json.dumps(index, indent=1) + "\n")
    _write_synced(folder / MARKER, f"{tick}\n")
    _sync(folder)
    for old in found(out)[:-keep] if keep else []:
        # The marker goes first: a half-deleted checkpoint must not look complete.
        (old.folder / MARKER).unlink()
        shutil.rmtree(old.folder)
    return Checkpoint(folder, tick, manifest_digest, shards)


def found(out: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run folder, oldest first. Torn ones are passed over."""
    checkpoints = []
    for marker in (out / CHECKPOINTS).glob(f"*/{MARKER}"):
        try:
            index = json.loads((marker.parent / INDEX).read_text())
            shards = {int(stage): Saved(**saved) for stage, saved in index["shards"].items()}
            checkpoints.append(Checkpoint(marker.parent, int(index["tick"]), index["manifest_digest"], shards))
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is passed over: its index cannot be read (%s)", marker.parent, error)
    return sorted(checkpoints, key=lambda c: c.tick)


def latest(out: Path, manifest_digest: str | None = None) -> Checkpoint:
    """The newest complete checkpoint; raises CheckpointError when there is none or it is of another manifest."""
    checkpoints = found(out)
    if not checkpoints:
        raise CheckpointError(f"no complete checkpoint below {out / CHECKPOINTS}: nothing to continue or export")
    newest = checkpoints[-1]
    if manifest_digest is not None and newest.manifest_digest != manifest_digest:
        raise CheckpointError(
            f"{newest.folder} was written by a run with manifest {newest.manifest_digest[:12]}..., "
            f"this run file gives {manifest_digest[:12]}...: resume with the run file of that run (only run.name, "
            "run.ticks, sampler, checkpoint and evaluation knobs may differ)"
        )
    return newest


def load_bases(checkpoint: Checkpoint) -> tuple[int, dict[Key, Tensor]]:
    """(version, bases) as the anchor held them at a checkpoint. Raises CheckpointError."""
    path = checkpoint.folder / BASES
    try:
        with safe_open(path, framework="pt") as file:
            version = int((file.metadata() or {})["version"])
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
        keys = {name: tuple(map(int, name.split("."))) for name in names}
        return version, {(b, Direction(d)): tensors[name] for name, (b, d) in keys.items()}
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: the bases cannot be read ({error}); they are needed to resume") from None


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
