"""What survives a power cut: a file as far as it was synced, a name as far as its folder was. Files only; no clock.

Stands in for `os.fsync`. At a cut, what was written behind a file's last sync is there in part, in full, or damaged; files
made since the last sync of their folder may be gone, and files removed since may be back.
"""

from __future__ import annotations

import os
import random
import stat
from pathlib import Path


class Disk:
    """All folders below `root`; `shadow` keeps what was removed."""

    def __init__(self, root: Path, shadow: Path, rng: random.Random) -> None:
        self.root, self.shadow, self.rng = root, shadow, rng
        self._synced: dict[int, int] = {}  # inode -> bytes that are on disk for sure
        self._names: dict[int, dict[str, int]] = {}  # inode of a folder -> its names, and their inodes
        shadow.mkdir(parents=True, exist_ok=True)

    def fsync(self, descriptor: int) -> None:
        """In place of `os.fsync`."""
        about = os.fstat(descriptor)
        if stat.S_ISDIR(about.st_mode):
            names = {entry.name: entry.inode() for entry in os.scandir(descriptor) if entry.is_file()}
            for name, inode in names.items():
                keep = self.shadow / str(inode)
                if not keep.exists():
                    os.link(name, keep, src_dir_fd=descriptor)
            self._names[about.st_ino] = names
        else:
            self._synced[about.st_ino] = about.st_size

    def power_cut(self, folder: Path, names: str = "") -> None:
        """Of everything in this folder that is called `names`... only what was synced is sure to be there."""
        if not folder.is_dir():
            return
        sure = self._names.get(folder.stat().st_ino, {})
        for path in sorted(folder.glob(f"{names}*")):
            inode = path.stat().st_ino
            if path.name not in sure and self.rng.random() < 0.5:
                path.unlink()
            else:
                self._tear(path, min(self._synced.get(inode, 0), path.stat().st_size))
        for name, inode in sorted(sure.items()):
            if name.startswith(names) and not (folder / name).exists() and self.rng.random() < 0.5:
                os.link(self.shadow / str(inode), folder / name)

    def _tear(self, path: Path, synced: int) -> None:
        data = path.read_bytes()
        tail = bytearray(data[synced : self.rng.randint(synced, len(data))])
        if tail and self.rng.random() < 0.3:
            tail[self.rng.randrange(len(tail))] ^= 0xFF
        with path.open("r+b") as file:
            file.seek(synced)
            file.write(tail)
            file.truncate()
