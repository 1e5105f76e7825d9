"""A run folder: the names inside it that both programs must agree on, and how one is made. No file of a run is opened here."""

from __future__ import annotations

import tempfile
from pathlib import Path

from swarm_core.errors import UserError

ADDRESS_FILE = "anchor_address"  # where the anchor listens, while it runs
MANIFEST_FILE = "manifest.json"
JOURNAL_FILE = "journal.jsonl"
RECORD_FILE = "rollouts.jsonl"
CHECKPOINTS = "checkpoints"
CHECKPOINT_INDEX = "index.json"  # over the shards of a checkpoint, written by the anchor


def make_folder(path: Path, flag: str = "--out") -> Path:
    """The folder, made where it is not there, once a file can be written in it. Raises UserError, in one line."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        what = "is a file" if path.is_file() else f"cannot be written to ({error.strerror})"
        raise UserError(f"{flag} {path} {what}: give a folder that may be made or written to") from None


def checkpoint_name(tick: int) -> str:
    """The folder of the checkpoint after `tick` ticks, below CHECKPOINTS."""
    return f"tick-{tick:08d}"
