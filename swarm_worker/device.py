"""Where a worker computes. One function."""

from __future__ import annotations

import torch

from swarm_core.errors import UserError


def pick_device(wanted: str) -> torch.device:
    """The device of `run.device`; `auto` is cuda if there is one. Raises UserError."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(f"run.device is cuda, but torch {torch.__version__} sees no GPU here: set it to auto or cpu")
    return torch.device(wanted)
