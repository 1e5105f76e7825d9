"""A stage's part of a folder has one holder, and none once that one has ended, however it did."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from swarm_core.errors import UserError
from swarm_worker.alone import FolderHeld, alone
from swarm_worker.stage_process import StageArguments, hold_stage

HOLDER = """
import sys, time
from pathlib import Path
from swarm_worker.alone import alone
with alone(Path(sys.argv[1]), 1):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_holder_is_told_who_the_first_is_and_what_to_do(tmp_path: Path) -> None:
    with alone(tmp_path, 1), alone(tmp_path, 2):  # those of a local run share a folder
        words = rf"stage 1 by process {os.getpid()} on .*: end that one .*another --out"
        with pytest.raises(FolderHeld, match=words), alone(tmp_path, 1):
            pass
        with alone(tmp_path / "elsewhere", 1):
            pass
    with alone(tmp_path, 1):
        pass


def test_what_ends_in_an_error_holds_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), alone(tmp_path, 1):
        raise KeyError
    with alone(tmp_path, 1):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_dead_hold_nothing_and_the_frozen_do(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(FolderHeld, match=f"process {process.pid} "), alone(tmp_path, 1):
            pass
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        process.wait()
        with alone(tmp_path, 1):
            assert (tmp_path / ".stage-01.lock").read_text().split()[0] == str(os.getpid())
    finally:
        process.kill()
        process.wait()


def test_where_nothing_can_be_locked_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with alone(tmp_path, 1):
        assert "cannot be locked (" in caplog.text


def test_a_worker_holds_its_stage_before_it_dials_and_until_it_ends(tmp_path: Path) -> None:
    arguments = StageArguments(1, "127.0.0.1:1", out=tmp_path, wait_s=30.0)

    async def run() -> None:
        first = asyncio.create_task(hold_stage(arguments, signals=False))
        while not (tmp_path / ".stage-01.lock").exists():
            await asyncio.sleep(0.001)
        with pytest.raises(FolderHeld):
            await hold_stage(arguments, signals=False)
        first.cancel()
        await asyncio.wait({first})
        with pytest.raises(UserError, match="did not answer within"):
            await hold_stage(StageArguments(1, "127.0.0.1:1", out=tmp_path, wait_s=0.1), signals=False)

    asyncio.run(run())
