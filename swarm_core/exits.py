"""How a command ends: which errors are the user's to mend (one line, exit code 2) and which are ours (1). No torch."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

BAD_INPUT = 2
BROKE = 1
INTERRUPTED = 130


class UserError(Exception):
    """Base of command-line errors that need no class of their own; `str()` is one readable line."""


def run_to_exit_code(command: str, work: Callable[[], int | None]) -> int:
    """Run a command; print what went wrong as one line on stderr, and say it with the exit code."""
    from swarm_core.config import ConfigError
    from swarm_core.data.errors import DataError
    from swarm_core.learning.errors import LearningError
    from swarm_core.manifest import ManifestError
    from swarm_core.models.architecture import ModelError
    from swarm_core.wire.errors import PortInUse, Refused, Unreachable, WireError

    mendable = (
        ConfigError,
        DataError,
        LearningError,
        ManifestError,
        ModelError,
        PortInUse,
        Refused,
        Unreachable,
        UserError,
    )
    try:
        return work() or 0
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except mendable as error:
        print(f"{command}: {error}", file=sys.stderr)
        return BAD_INPUT
    except WireError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return BROKE
    except Exception:
        logging.getLogger(command).exception("%s broke; this is a bug, please report it with the lines below", command)
        return BROKE
