"""`swarm_worker local`: the same programs as separate OS processes over loopback, started, watched and ended together."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from swarm_core.errors import UserError
from swarm_core.exits import BROKE

ADDRESS_FILE = "anchor_address"
START_LIMIT_S = 300.0  # importing torch and calibrating on a loaded machine
LEAVE_LIMIT_S = 120.0  # after a drain is asked for: one tick and a checkpoint
LOG_TAIL_LINES = 15


@dataclass
class Child:
    """One process of the swarm and where its words go."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


def run_local(arguments: argparse.Namespace) -> int:
    """Bring up a swarm, wait for its end. Returns the exit code of the run."""
    out: Path = arguments.out
    anchor = _anchor_command(arguments)
    if arguments.dry_run:
        return subprocess.run([*anchor, "--dry-run"], check=False).returncode
    if arguments.fresh and out.exists():
        if not (out / "manifest.json").exists() and any(out.iterdir()):
            raise UserError(f"--fresh would delete {out}, which does not look like a run folder: delete it yourself")
        shutil.rmtree(out)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    (out / ADDRESS_FILE).unlink(missing_ok=True)
    swarm = LocalSwarm(out)
    try:
        return swarm.run(anchor)
    finally:
        swarm.kill()


def _anchor_command(arguments: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "anchor_node.cli", "serve", "--config", str(arguments.config)]
    command += ["--out", str(arguments.out), "--listen", arguments.listen]
    overrides = list(arguments.set)
    overrides += [f"swarm.stages={arguments.stages}"] if arguments.stages is not None else []
    overrides += [f"run.ticks={arguments.ticks}"] if arguments.ticks is not None else []
    for override in overrides:
        command += ["--set", override]
    return command + (["--resume"] if arguments.resume else [])


class LocalSwarm:
    """The children, in the order they were started: anchor, stages, sampler."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.children: list[Child] = []
        self._interrupts = 0

    def run(self, anchor_command: list[str]) -> int:
        """Start everything and wait until the anchor says the run is over, or somebody dies."""
        signal.signal(signal.SIGINT, self._interrupted)
        signal.signal(signal.SIGTERM, self._interrupted)
        # The anchor draws the live table, so it keeps the terminal; its own log goes to a file of its own.
        anchor = self._start("anchor", [*anchor_command, "--log", str(self.out / "logs" / "anchor.log")], terminal=True)
        address = self._await_address(anchor)
        if address is None:
            return anchor.process.wait()
        worker = [sys.executable, "-m", "swarm_worker.cli"]
        common = ["--anchor", address, "--out", str(self.out)]
        for stage in range(self._stages()):
            self._start(f"stage-{stage}", [*worker, "join", "--stage", str(stage), *common])
        self._start("sampler", [*worker, "sample", *common])
        return self._watch()

    def _stages(self) -> int:
        return len(json.loads((self.out / "manifest.json").read_text())["spans"])

    def _start(self, name: str, command: list[str], *, terminal: bool = False) -> Child:
        log = self.out / "logs" / f"{name}.log"
        # One thread unless the run file says otherwise: processes outnumber cores here.
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                stdout=None if terminal else file,
                stderr=None if terminal else file,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches us alone; we pass it on once, to the anchor
                env=environment,
            )
        child = Child(name, process, log)
        self.children.append(child)
        return child

    def _await_address(self, anchor: Child) -> str | None:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if anchor.process.poll() is not None:
                return None
            file = self.out / ADDRESS_FILE
            if file.exists() and (text := file.read_text().strip()):
                return text
            time.sleep(0.05)
        raise UserError(f"the anchor did not come up within {START_LIMIT_S:.0f} s; see {anchor.log}")

    def _watch(self) -> int:
        """0 when all ended well; the first child that ends badly decides otherwise."""
        while True:
            for child in self.children:
                code = child.process.poll()
                if code not in (None, 0):
                    return self._died(child, code)
            if self.children[0].process.poll() == 0:
                return self._await_rest()
            time.sleep(0.1)

    def _await_rest(self) -> int:
        deadline = time.monotonic() + 15.0
        for child in self.children[1:]:
            try:
                code = child.process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(f"swarm_worker local: {child.name} did not leave, ended by force", file=sys.stderr)
                continue
            if code != 0:
                return self._died(child, code)
        return 0

    def _died(self, child: Child, code: int) -> int:
        # The one that failed first may not be the one seen first: neighbours fail within the same moments.
        time.sleep(1.0)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        print(f"swarm_worker local: {child.name} ended with {how}. The end of {child.log}:", file=sys.stderr)
        for line in child.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]:
            print(f"  {line}", file=sys.stderr)
        print(f"All logs are in {self.out / 'logs'}; --resume continues from the newest checkpoint.", file=sys.stderr)
        return code if code > 0 else BROKE

    def _interrupted(self, number: int, _frame: object) -> None:
        """First: drain through the anchor. Second: end now."""
        self._interrupts += 1
        if self._interrupts > 1 or not self.children:
            raise KeyboardInterrupt
        self.children[0].process.send_signal(number)

    def kill(self) -> None:
        """Whatever is left goes."""
        for child in self.children:
            if child.process.poll() is None:
                child.process.kill()
        for child in self.children:
            child.process.wait()
