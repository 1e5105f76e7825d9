"""`swarm_worker local`: the same programs as separate OS processes over loopback, started, watched and ended together."""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from swarm_core.errors import UserError
from swarm_core.exits import BAD_INPUT, BROKE, INTERRUPTED, leave_terminal
from swarm_core.run_folder import ADDRESS_FILE, MANIFEST_FILE, make_folder

START_LIMIT_S = 300.0  # importing torch and calibrating on a loaded machine
LEAVE_LIMIT_S = 15.0  # for the last reports, once the anchor has gone
RESTARTS = 3  # of one that was killed; one that dies again and again is no accident
BLAME_LIMIT_S = 5.0  # for the others to fail too, once one has
LOG_TAIL_LINES = 15
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class Child:
    """One process of the swarm and where its words go."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    command: list[str]
    restarts: int = 0


def run_local(arguments: argparse.Namespace) -> int:
    """Bring up a swarm, wait for its end. Returns the exit code of the run."""
    from swarm_core.wire.pacing import read_limits
    from swarm_core.wire.streams import is_loopback

    read_limits(arguments.limit_mbps)  # a bad one is refused before anything starts
    if not is_loopback(arguments.listen):
        raise UserError(
            f"--listen {arguments.listen}: local keeps to this machine; start `anchor_node serve` for others"
        )
    out: Path = arguments.out
    anchor = _anchor_command(arguments)
    if arguments.dry_run:
        return _dry_run(arguments, anchor)
    if arguments.fresh and (arguments.resume or arguments.resume_from):
        raise UserError("--fresh deletes the run that --resume would continue: give one of them")
    make_folder(out)
    earlier = _set_aside(out) if arguments.fresh else None
    make_folder(out / "logs")
    (out / ADDRESS_FILE).unlink(missing_ok=True)
    swarm = LocalSwarm(out, arguments.limit_mbps)
    try:
        code = swarm.run(anchor, lambda address: _anchor_command(arguments, again_at=address))
    finally:
        swarm.kill()
        if earlier is not None:
            _drop_or_restore(earlier, out, started=swarm.started)
    return code


def _dry_run(arguments: argparse.Namespace, anchor: list[str]) -> int:
    from swarm_core.config import load, parse_overrides
    from swarm_worker.device import pick_device

    code = subprocess.run([*anchor, "--dry-run"], check=False).returncode
    if code == 0:
        pick_device(load(arguments.config, parse_overrides(_overrides(arguments))).run.device)
    return code


def _set_aside(out: Path) -> Path | None:
    """Move an earlier run out of the way; it is deleted only once the new one has started."""
    if not out.exists() or not any(out.iterdir()):
        return None
    if not (out / MANIFEST_FILE).exists():
        raise UserError(f"--fresh would delete {out}, which does not look like a run folder: delete it yourself")
    return out.rename(tempfile.mkdtemp(prefix=f"{out.name}.earlier-", dir=out.absolute().parent))


def _drop_or_restore(earlier: Path, out: Path, *, started: bool) -> None:
    if started:
        shutil.rmtree(earlier)
        return
    shutil.rmtree(out)
    earlier.rename(out)


def _anchor_command(arguments: argparse.Namespace, again_at: str = "") -> list[str]:
    """How the anchor is started, or (`again_at` an address) how one takes over from one that was killed."""
    listen = arguments.listen
    if again_at:
        listen = f"{listen.rpartition(':')[0]}:{again_at.rpartition(':')[2]}"
    command = [sys.executable, "-m", "anchor_node.cli", "serve", "--config", str(arguments.config)]
    command += ["--out", str(arguments.out), "--listen", listen]
    for override in _overrides(arguments):
        command += ["--set", override]
    if again_at:
        return [*command, "--resume"]
    command += ["--resume-from", arguments.resume_from] if arguments.resume_from else []
    return command + (["--resume"] if arguments.resume else [])


def _overrides(arguments: argparse.Namespace) -> list[str]:
    overrides = list(arguments.set)
    overrides += [f"swarm.stages={arguments.stages}"] if arguments.stages is not None else []
    overrides += [f"run.ticks={arguments.ticks}"] if arguments.ticks is not None else []
    return overrides


def _stop_with_parent() -> Callable[[], None] | None:
    """What a child runs before its program: on Linux it asks for SIGTERM, hence for the end after the tick under way
    with a checkpoint, when this process is gone without a word (kill -9). None elsewhere."""
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None
    return functools.partial(prctl, PR_SET_PDEATHSIG, int(signal.SIGTERM))


class LocalSwarm:
    """The children, in the order they were started: anchor, stages, sampler."""

    def __init__(self, out: Path, limit_mbps: str | None = None) -> None:
        self.out = out
        self._limit = [] if limit_mbps is None else ["--limit-mbps", limit_mbps]
        self.children: list[Child] = []
        self.started = False  # the anchor came up: the run file, the model and the data are sound
        self._interrupts = 0
        self._take_over: list[str] = []
        self._restarts = 0
        self._asked_anchor = False  # to end the run: whatever it does then, it is not started again

    def run(self, anchor_command: list[str], take_over: Callable[[str], list[str]]) -> int:
        """Start everything and wait until the anchor says the run is over, or somebody dies.

        `take_over` is the command of an anchor that carries on at the address of one that was killed.
        """
        signal.signal(signal.SIGINT, self._interrupted)
        signal.signal(signal.SIGTERM, self._interrupted)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup a hang-up is ignored, and stays so
            signal.signal(signal.SIGHUP, self._interrupted)
        # The anchor draws the live table, so it keeps the terminal; its own log goes to a file of its own.
        anchor = self._start_anchor(anchor_command)
        address = self._await_address(anchor)
        if address is None:
            code = anchor.process.wait()
            return code if code >= 0 else INTERRUPTED
        self.started = True
        worker = [sys.executable, "-m", "swarm_worker.cli"]
        common = ["--anchor", address, "--out", str(self.out), "--insecure"]  # whatever token is in the environment
        for stage in range(self._stages()):
            self._start(f"stage-{stage}", [*worker, "join", "--stage", str(stage), *common, *self._limit])
        self._start("sampler", [*worker, "sample", *common])
        self._take_over = take_over(address)
        return self._watch()

    def _start_anchor(self, command: list[str]) -> Child:
        return self._start("anchor", [*command, "--log", str(self.out / "logs" / "anchor.log")], terminal=True)

    def _stages(self) -> int:
        return len(json.loads((self.out / MANIFEST_FILE).read_text())["spans"])

    def _start(self, name: str, command: list[str], *, terminal: bool = False) -> Child:
        log = self.out / "logs" / f"{name}.log"
        # One thread unless the run file says otherwise: processes outnumber cores here.
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        with log.open("ab") as file:
            output = None if terminal else file
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches us alone; we pass it on once, to the anchor
                preexec_fn=_stop_with_parent(),  # noqa: PLW1509 - no other thread runs here
                env=environment,
            )
        child = Child(name, process, log, command)
        self.children.append(child)
        return child

    def _await_address(self, anchor: Child) -> str | None:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if anchor.process.poll() is not None:
                return None
            file = self.out / ADDRESS_FILE
            if file.exists():
                return file.read_text().strip()
            time.sleep(0.05)
        raise UserError(f"the anchor did not come up within {START_LIMIT_S:.0f} s; see {anchor.log}")

    def _watch(self) -> int:
        """0 when all ended well; otherwise the child that ends badly is reported."""
        while self.children[0].process.poll() is None or self._anchor_again():
            ended = [child for child in self.children[1:] if child.process.poll() not in (None, 0)]
            if not all(self._again(child) for child in ended):
                self._await_end(BLAME_LIMIT_S)  # neighbours fail in the same moments: let them, to find who began
                break
            time.sleep(0.1)
        else:
            self._await_rest()
        ended = [(child, child.process.poll()) for child in self.children]
        bad = [(child, code) for child, code in ended if code not in (None, 0)]
        return self._report(bad) if bad else 0

    def _again(self, child: Child) -> bool:
        """Start a stage or the sampler anew, if it was killed: it takes up what it had on disk, and the swarm goes on."""
        code = child.process.poll()
        if code is None or code >= 0 or child.restarts == RESTARTS or self._interrupts:
            return False
        print(
            f"swarm_worker local: {child.name} ended with signal {signal.Signals(-code).name}; it is started again "
            f"({child.restarts + 1} of {RESTARTS})",
            file=sys.stderr,
        )
        child.process, child.restarts = self._start(child.name, child.command).process, child.restarts + 1
        self.children.pop()  # where every new child is put
        return True

    def _anchor_again(self) -> bool:
        """Start the anchor anew if it was killed while the others work; they neither wait for it nor end with it.

        One that ends in order, also in failure, tells everybody to leave and removes its address.
        """
        anchor, *others = self.children
        code = anchor.process.poll()
        killed = code not in (0, BAD_INPUT) and (self.out / ADDRESS_FILE).exists()
        if not killed or self._asked_anchor or self._restarts == RESTARTS:
            return False
        if any(child.process.poll() is not None for child in others):
            return False  # the run is over, or broken; there is nothing to carry on
        self._restarts += 1
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        print(
            f"swarm_worker local: the anchor ended with {how}; the others go on, and it is started again "
            f"({self._restarts} of {RESTARTS})",
            file=sys.stderr,
        )
        self.children[0] = self._start_anchor(self._take_over)
        self.children.pop()  # where every new child is put
        return True

    def _await_end(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and any(child.process.poll() is None for child in self.children):
            time.sleep(0.05)

    def _await_rest(self) -> None:
        """The anchor has sent everybody home; a child that had not even joined has no one left to join."""
        deadline = time.monotonic() + LEAVE_LIMIT_S
        while time.monotonic() < deadline and any(child.process.poll() is None for child in self.children):
            if self._interrupts:
                deadline = min(deadline, time.monotonic() + 3.0)
            time.sleep(0.05)
        for child in self.children:
            if child.process.poll() is None:
                child.process.kill()
                child.process.wait()
                child.process.returncode = 0
                if not self._interrupts:
                    print(f"swarm_worker local: {child.name} did not leave, ended by force", file=sys.stderr)

    def _report(self, bad: list[tuple[Child, int]]) -> int:
        """Show the end of the log of the one that failed first, as far as can be told. Returns the exit code."""

        def suspicion(entry: tuple[Child, int]) -> tuple[int, int]:
            child, code = entry  # killed, then refused, then broken; a stage before the anchor that only saw it go
            return (0 if code < 0 else 1 if code == BAD_INPUT else 2, child.name == "anchor")

        child, code = min(bad, key=suspicion)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        print(f"swarm_worker local: {child.name} ended with {how}. The end of {child.log}:", file=sys.stderr)
        for line in child.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]:
            print(f"  {line}", file=sys.stderr)
        print(f"All logs are in {self.out / 'logs'}; --resume continues from the newest checkpoint.", file=sys.stderr)
        return code if code > 0 else BROKE

    def _interrupted(self, number: int, _frame: object) -> None:
        """First: drain. Second: end now."""
        self._interrupts += 1
        if number == signal.SIGHUP:
            leave_terminal()
        if self._interrupts > 1 or not self.children:
            raise KeyboardInterrupt
        anchor, *others = self.children
        self._asked_anchor = not others or self._restarts == 0 and anchor.process.poll() is None
        # An anchor that is down, or only just coming up, is not asked: stage 0 ends the run as well, and tells it.
        (anchor if self._asked_anchor else others[0]).process.send_signal(number)

    def kill(self) -> None:
        """Whatever is left goes."""
        for child in self.children:
            if child.process.poll() is None:
                child.process.kill()
        for child in self.children:
            child.process.wait()
