"""`anchor_node export`: a checkpoint's shards as one model in Hugging Face layout. Reads a run folder, starts nothing."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from anchor_node.checkpoints import Checkpoint, CheckpointError, found, latest
from swarm_core.models.architecture import resolve
from swarm_core.models.export import export, own_names
from swarm_core.run_folder import CHECKPOINTS, MANIFEST_FILE


def export_run(folder: Path, to: Path) -> int:
    """Export the newest complete checkpoint of a run folder, or the one given. Raises CheckpointError, ModelError."""
    checkpoint = _pick(folder)
    run = checkpoint.folder.parent.parent
    try:
        source = resolve(json.loads((run / MANIFEST_FILE).read_text())["config"]["model"]["path"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{run / MANIFEST_FILE}: cannot tell which model this run started from ({error})"
        ) from None
    shards = [_weights(checkpoint.folder / saved.file) for _, saved in sorted(checkpoint.shards.items())]
    made = export(shards, source, to)
    print(f"{checkpoint.folder} -> {made}: load it with AutoModelForCausalLM.from_pretrained({str(made)!r})")
    return 0


def _pick(folder: Path) -> Checkpoint:
    if folder.parent.name == CHECKPOINTS:
        run = folder.resolve().parent.parent
        for checkpoint in found(run):
            if checkpoint.folder.resolve() == folder.resolve():
                return checkpoint
        raise CheckpointError(f"{folder} is not a complete checkpoint")
    return latest(folder)


def _weights(path: Path) -> dict[str, Tensor]:
    """The model's own tensors of a shard, not the optimizer's."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in own_names(file.keys())}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: this stage's shard cannot be read ({error}); copy it here to export") from None
