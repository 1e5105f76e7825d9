"""Forked children behave as fresh processes do: their own session and signals, their output, their exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = """
import os, signal, sys, time
def main(arguments):
    print("session", os.getsid(0) == os.getpid(), "input", sys.stdin.read() == "", flush=True)
    print("handlers", signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, file=sys.stderr, flush=True)
    if arguments == ["sleep"]:
        time.sleep(60)
    if arguments == ["raise"]:
        raise ValueError("on purpose")
    return int(arguments[0])
"""
# Forked from a small process: this one has threads.
PARENT = """
import logging, pathlib, signal, sys, time
sys.path.insert(0, {folder!r})
from swarm_worker.forked import fork
logging.basicConfig(stream=sys.stderr)
signal.signal(signal.SIGTERM, lambda *_: None)
log = pathlib.Path({folder!r}, "log")
def start(*arguments):
    with log.open("ab") as file:
        return fork("forked_program", arguments, file, lambda: print("first", flush=True))
seven, broken, sleeper = start("7"), start("raise"), start("sleep")
assert seven.wait() == 7 and broken.wait() == 1
assert sleeper.poll() is None
while log.read_text().count("handlers") < 3:
    time.sleep(0.01)
sleeper.send_signal(signal.SIGTERM)
assert sleeper.wait() == -signal.SIGTERM
sleeper.kill()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="children are forked on Linux alone")
def test_a_forked_child_is_as_a_fresh_process(tmp_path: Path) -> None:
    (tmp_path / "forked_program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'proto'}"}
    done = subprocess.run(
        [sys.executable, "-c", PARENT.format(folder=str(tmp_path))],
        env=environment,
        input="not for the children",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "log").read_text()
    assert log.count("session True input True") == log.count("handlers True") == 3
    assert log.count("ValueError: on purpose") == 1
    assert done.stdout.count("first") == 3 and "handlers" not in done.stderr
