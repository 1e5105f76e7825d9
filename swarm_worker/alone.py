"""One process at a time for a stage below a folder: two would write one log. No file of the stage itself is opened here."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from swarm_core.errors import UserError
from swarm_core.run_folder import make_folder

log = logging.getLogger(__name__)


class FolderHeld(UserError):
    """Another process works on this stage in this folder."""


@contextlib.contextmanager
def alone(out: Path, stage: int) -> Iterator[None]:
    """Hold a stage's part of a folder. The kernel gives it back when the process ends, in whatever way. Raises UserError.

    The lock lies on a file that stays: were it deleted, two processes could hold two files of one name.
    """
    path = make_folder(out) / f".stage-{stage:02d}.lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                log.warning(
                    "%s cannot be locked (%s): see to it that no other process is given this folder", path, error
                )
                yield
                return
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise FolderHeld(
                f"--out {out} is in use for stage {stage} by process {holder}: end that one first (kill -9, where it is "
                "frozen), or give another --out"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
