"""How a command ends: one line and exit code 2 for what the user can mend, 1 for what broke, 130 for an interrupt.

What is installed, as --version prints it and peers compare it, is here too; no command and no error is.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import stat
import sys
from collections.abc import Callable

from swarm_core.errors import KedgeError, UserError

BAD_INPUT = 2
BROKE = 1
INTERRUPTED = 130


def run_to_exit_code(command: str, work: Callable[[], int | None]) -> int:
    """Run a command; print what went wrong as one line on stderr, and say it with the exit code."""
    try:
        return work() or 0
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except KedgeError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, UserError) else BROKE
    except Exception:
        logging.getLogger(command).exception("%s broke; this is a bug, please report it with the lines below", command)
        return BROKE


def version() -> str:
    """What `--version` prints."""
    try:
        return f"%(prog)s of kedge {importlib.metadata.version('kedge')}"
    except importlib.metadata.PackageNotFoundError:
        return "%(prog)s of kedge, not installed: run from its folder"


def installed() -> dict[str, str]:
    """The versions that two machines of a swarm should share; empty where a package is run from its folder."""
    found = {}
    for name in ("kedge", "torch", "grpcio", "protobuf"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def leave_terminal() -> None:
    """The terminal has hung up: what would still be written to it goes nowhere, where it would raise."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # isatty would say no: it cannot be asked any more
            os.dup2(nowhere, descriptor)
    os.close(nowhere)


def quiet_grpc() -> None:
    """Before gRPC is imported: its C core would write a line of its own to stderr for every handshake that fails."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
