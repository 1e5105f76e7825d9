"""Children of `swarm_worker local` by fork, from a process that has imported what they need. No program of its own.

Importing torch and transformers takes a stage, a sampler and the anchor 3 to 5 s of CPU each, before any of them does
anything; forked from one that has done so, they begin in 0.2 s, and share the memory of what was imported.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import logging
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

# What the programs import between their first line and their first tick; nothing here opens a socket or a device.
IMPORTS = (
    "swarm_worker.stage_process",
    "swarm_worker.sampler.process",
    "swarm_worker.sampler.hf",
    "transformers.modeling_layers",
    "transformers.models.auto.tokenization_auto",
)


class Forked:
    """A forked child, with as much of `subprocess.Popen` as `local` asks for. `returncode` is -N after signal N."""

    def __init__(self, process: multiprocessing.process.BaseProcess) -> None:
        self._process = process
        self.pid = process.pid or 0
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._process.exitcode
        return self.returncode

    def wait(self) -> int:
        """The exit code, once it has ended."""
        self._process.join()
        return self.poll() or 0

    def send_signal(self, number: int) -> None:
        """To a child that has ended nothing is sent."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it now."""
        self.send_signal(signal.SIGKILL)


def import_once() -> bool:
    """Import for all children to come, and say whether they may be forked.

    Only on Linux (macOS' frameworks do not survive a fork) and with a torch for CPUs alone: with a CUDA build, whatever
    asked for a device before the fork would break it after.
    """
    if sys.platform != "linux" or not _torch_for_cpus():
        return False
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it, as for children that are not forked
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()  # or the first collection in a child would write to, and so copy, every page with an object
    return True


def fork(
    module: str, arguments: Sequence[str], output: BinaryIO | None, at_start: Callable[[], object] | None
) -> Forked:
    """`python -m module arguments` without a new interpreter: calls its `main`, whose result is the exit code.

    A session of its own, no input, signals as a fresh process has them, stdout and stderr into `output` (None: ours).
    `at_start` runs first in the child.
    """
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_become, args=(module, list(arguments), output, at_start), name=module)
    process.start()
    return Forked(process)


def _become(module: str, arguments: list[str], output: BinaryIO | None, at_start: Callable[[], object] | None) -> None:
    os.setsid()
    if at_start is not None:
        at_start()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # under nohup a hang-up is ignored, and stays so
            signal.signal(number, signal.SIG_DFL)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    if output is not None:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    root = logging.getLogger()
    for handler in list(root.handlers):  # basicConfig does nothing where one is set
        root.removeHandler(handler)
    sys.argv = [module, *arguments]
    sys.exit(importlib.import_module(module).main(arguments))


def _torch_for_cpus() -> bool:
    """Told by torch's version file, without importing torch."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    told = runpy.run_path(str(Path(found.origin).with_name("version.py")))
    return told.get("cuda") is None and told.get("hip") is None
