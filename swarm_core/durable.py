"""Files that must survive a power cut: synced, and replaced in one step. Nothing here knows what is in them."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, data: bytes, *, synced: bool = True) -> None:
    """Write a file anew: whoever is killed leaves the old or the new one whole. Not `synced`, a power cut may leave neither."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        if synced:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)
    if synced:
        sync(path.parent)
