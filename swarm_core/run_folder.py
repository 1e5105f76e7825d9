"""A run folder: the names inside it that both programs must agree on, and how one is made. No file of a run is opened here."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from swarm_core.errors import UserError

ADDRESS_FILE = "anchor_address"  # where the anchor listens, while it runs
MANIFEST_FILE = "manifest.json"
JOURNAL_FILE = "journal.jsonl"
RECORD_FILE = "rollouts.jsonl"
CHECKPOINTS = "checkpoints"
CHECKPOINT_INDEX = "index.json"  # over the shards of a checkpoint, written by the anchor
HF = "hf"  # in a checkpoint's folder: the same weights as a model that transformers loads
REDO = "redo"
MOST_LOST = (
    10  # ticks that the loss of a host may cost: so far behind may a copy be, and so far back can every stage go
)


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


def stage_name(stage: int, stages: int) -> str:
    """What a stage's own files and folders are called."""
    return f"stage-{stage:02d}-of-{stages:02d}"


def shard_name(stage: int, stages: int) -> str:
    """A stage's shard, in the folder of a checkpoint."""
    return f"{stage_name(stage, stages)}.safetensors"


def hf_name(stage: int, stages: int) -> str:
    """A stage's layers in the folder HF of a checkpoint, as transformers calls a part of a model."""
    return f"model-{stage + 1:05d}-of-{stages:05d}.safetensors"


def log_name(tick: int) -> str:
    """A file of a stage's redo log, in REDO/stage_name: it begins with that tick."""
    return f"tick-{tick:08d}.log"


def copied_files(stage: int, stages: int) -> re.Pattern[str]:
    """The names, below its run folder, of the files that a stage has copied to another host; no other one is one.

    Group `log` or `shard` is the tick, where it is one of those.
    """
    name, tick = stage_name(stage, stages), r"tick-(?P<{}>[0-9]{{8,10}})"
    patterns = [
        rf"{REDO}/{name}/{tick.format('log')}\.log",
        rf"{CHECKPOINTS}/{tick.format('shard')}/{name}\.safetensors",
        *([re.escape(JOURNAL_FILE)] if stage == 0 else []),
    ]
    return re.compile("|".join(patterns))
