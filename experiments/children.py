"""Children of a bench: Python modules run as processes with a log each. Knows nothing of what they do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """A bench cannot run here, or one of its processes fell over; the message says what to look at."""


class Child:
    """A Python module run behind a command prefix (to enter a namespace, say). With `talks` it answers lines, else what
    it says goes to its log; `core` None leaves it where the kernel puts it."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[object],
        logs: Path,
        *,
        prefix: Sequence[str] = (),
        talks: bool = True,
        core: int | None = None,
    ) -> None:
        self.name = name
        self.log = logs / f"{name}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
        environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "proto")))
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", module, *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if talks else file,
                stderr=file,
                env=environment,
                text=True,
                start_new_session=True,
            )
        if core is not None:
            os.sched_setaffinity(self.process.pid, {core})  # threads inherit it: there is none yet

    @property
    def inlet(self) -> IO[str]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def outlet(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def line(self) -> str:
        """The next line that the process says; an error with the end of its log if there is none."""
        text = self.outlet.readline()
        if not text:
            raise self.died()
        return text

    def ask(self, line: str) -> str:
        self.inlet.write(line + "\n")
        self.inlet.flush()
        return self.line()

    def died(self) -> BenchError:
        tail = "\n  ".join(self.log.read_text(errors="replace").splitlines()[-12:])
        return BenchError(f"{self.name} ended (exit code {self.process.poll()}); the end of {self.log}:\n  {tail}")

    def running(self) -> bool:
        """False once it has ended well. Raises BenchError when it has failed."""
        code = self.process.poll()
        if code:
            raise self.died()
        return code is None

    def cpu_s(self) -> float:
        """Seconds of CPU that the process has used so far, in user and kernel mode, all threads."""
        after_name = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(after_name[11]) + int(after_name[12])) / TICKS_PER_S

    def close(self, wait_s: float = 20.0) -> None:
        """Close its input and wait; whatever is left then goes by force."""
        if not self.inlet.closed:
            self.inlet.close()
        try:
            self.process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
