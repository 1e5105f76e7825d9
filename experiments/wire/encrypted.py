"""Runs a module of this project with every stream encrypted, and a ledger that knows. `FOLDER MODULE ARGUMENT...`"""

from __future__ import annotations

import functools
import runpy
import sys
from pathlib import Path
from typing import Any

from experiments.wire.endpoint import encrypt
from swarm_core.wire.ledger import Ledger


def main() -> None:
    folder, module = Path(sys.argv[1]), sys.argv[2]
    encrypt(folder)
    made: Any = Ledger
    made.__init__ = functools.partialmethod(Ledger.__init__, tls=True)
    sys.argv = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
