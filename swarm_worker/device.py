"""Where a worker computes. One function."""

from __future__ import annotations

import torch


def pick_device(wanted: str) -> torch.device:
    """The device of `run.device`; `auto` is cuda if there is one."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)
