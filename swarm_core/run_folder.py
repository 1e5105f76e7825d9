"""Names inside a run folder that both programs must agree on. Nothing is opened here."""

from __future__ import annotations

ADDRESS_FILE = "anchor_address"  # where the anchor listens, while it runs
MANIFEST_FILE = "manifest.json"
JOURNAL_FILE = "journal.jsonl"
RECORD_FILE = "rollouts.jsonl"
CHECKPOINTS = "checkpoints"


def checkpoint_name(tick: int) -> str:
    """The folder of the checkpoint after `tick` ticks, below CHECKPOINTS."""
    return f"tick-{tick:08d}"
