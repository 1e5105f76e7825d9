"""A swarm of real processes that are started again when they were killed; on this machine, or each on a host of its own."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from warm_programs import WarmPrograms, command

from deploy.wan.link import Host
from swarm_core.run_folder import JOURNAL_FILE
from swarm_worker.failpoints import VARIABLE

# An anchor awaits whoever is away when the run ends: here most often a sampler that was killed, and does not come back.
CONSTANTS = {"anchor_node.service.GRACE_S": 8.0}
LIMIT_S = 180.0  # for the next tick: importing torch on a loaded machine, twice


class Processes:
    """An anchor, its stages and a sampler, each a process; anchor, stages and sampler in this order on `hosts`."""

    def __init__(
        self,
        programs: WarmPrograms,
        run_file: Path,
        out: Path,
        stages: int,
        failpoints: str = "",
        hosts: Sequence[Host] = (),
    ) -> None:
        out.mkdir(parents=True)
        self.out = out
        self._programs, self._environment = programs, {VARIABLE: failpoints}
        names = ["anchor", *(f"stage {i}" for i in range(stages)), "sampler"]
        self.hosts = dict(zip(names, hosts, strict=True)) if hosts else {}
        address = f"{hosts[0].address}:7400" if hosts else f"127.0.0.1:{free_port()}"
        common = ("--anchor", address, "--out", out)
        serve = ("serve", "--config", run_file, "--out", out, "--listen", address, "--log", out / "anchor-words.log")
        self._commands = {"anchor": command("anchor_node", *serve)}
        for stage in range(stages):
            listen = ("--listen", f"{hosts[stage + 1].address}:7401") if hosts else ()
            admitted = self._admitted("--role", "stage", "--stage", stage)
            self._commands[f"stage {stage}"] = command(
                "swarm_worker", "join", "--stage", stage, *common, *listen, *admitted
            )
        self._commands["sampler"] = command("swarm_worker", "sample", *common, *self._admitted("--role", "sampler"))
        self.running = {name: self._start(name) for name in self._commands}

    def _admitted(self, *who: object) -> tuple[str, ...]:
        """What lets somebody in: nothing on this machine, a token of the anchor's elsewhere."""
        if not self.hosts:
            return ()
        made = self._programs.run(command("anchor_node", "token", "create", "--out", self.out, *who))
        assert made.returncode == 0, made.stderr
        return ("--token", made.stdout.strip())

    def _start(self, name: str, *more: str) -> Any:
        host = self.hosts.get(name)
        with (self.out / f"{name}.log").open("ab") as log:
            return self._programs.start(
                [*self._commands[name], *more],
                env=self._environment,
                output=log,
                constants=CONSTANTS,
                namespace=host.namespace if host else "",
            )

    @property
    def ticks(self) -> int:
        path = self.out / JOURNAL_FILE
        return len(path.read_text().splitlines()) if path.exists() else 0

    def words(self, name: str) -> str:
        """What a process has logged."""
        return (self.out / ("anchor-words.log" if name == "anchor" else f"{name}.log")).read_text()

    def kill(self, name: str) -> None:
        self.running[name].send_signal(signal.SIGKILL)
        self.running[name].wait()

    def see_to_it(self) -> bool:
        """Start anew whoever was killed; whether the run is still on. Raises where somebody failed."""
        for name, process in self.running.items():
            code = process.poll()
            assert code in (None, 0, -signal.SIGKILL), f"{name}: {code}\n{self.words(name)[-2000:]}"
            if code == -signal.SIGKILL:
                self.running[name] = self._start(name, *(["--resume"] if name == "anchor" else []))
        return self.running["anchor"].poll() is None

    def until(self, ticks: int) -> bool:
        """Wait until so many ticks are decided; False when the run is over."""
        deadline = time.monotonic() + LIMIT_S
        while self.see_to_it():
            if self.ticks >= ticks:
                return True
            assert time.monotonic() < deadline, f"no tick after {self.ticks} in {LIMIT_S} s"
            time.sleep(0.02)
        return False

    def end(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        while any(p.poll() is None for p in self.running.values()) and time.monotonic() < deadline:
            self.see_to_it()
            time.sleep(0.05)

    def stop(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
