"""The two programs as processes of their own, started without the seconds that importing torch and transformers takes.

A *warm* interpreter imports what the programs import, and nothing else: it opens no channel, runs no operation, starts no
thread. It forks whoever is asked for, and each of those is a real process with a memory, files, signals and an end of its
own, which runs `python -m PROGRAM.cli ARGUMENTS` from there on. What `swarm_worker local` starts is forked in the same way.
Where a process comes from is all that differs: with KEDGE_COLD=1 (`make test-faults`), and elsewhere than on Linux,
everything is a new interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'proto'}", "OMP_NUM_THREADS": "1"}
COLD = sys.platform != "linux" or bool(os.environ.get("KEDGE_COLD"))
# What the programs import once they know what they are to do; they themselves are run, not imported.
IMPORTS = (
    "anchor_node.serve", "anchor_node.report", "anchor_node.plan", "anchor_node.export", "anchor_node.status",
    "swarm_worker.stage_process", "swarm_worker.sampler.process", "swarm_worker.sampler.hf", "swarm_worker.local",
    "transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2",
)  # fmt: skip
CLONE_NEWNET = 0x40000000  # linux/sched.h; os.setns comes with Python 3.12
LARGEST_REQUEST = 1 << 17  # an environment


def command(program: str, *arguments: object) -> list[str]:
    """What a user types, with this interpreter."""
    return [sys.executable, "-m", f"{program}.cli", *map(str, arguments)]


class Process:
    """A program that was forked, with what tests use of subprocess.Popen; pipes are read as text, by `communicate` alone."""

    def __init__(self, warm: WarmPrograms, pid: int, descriptor: int, pipes: list[int | None]) -> None:
        self._warm, self.pid, self._descriptor = warm, pid, descriptor  # a descriptor of the process, never another's
        self._pipes = pipes
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._descriptor], [], [], 0)[0]:
            self.returncode = self._warm.reap(self.pid)
            os.close(self._descriptor)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._descriptor], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._descriptor, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def communicate(self, timeout: float = 60.0) -> tuple[str, str]:
        """What it and its children write until all of them are gone."""
        said, deadline = {pipe: b"" for pipe in self._pipes if pipe is not None}, time.monotonic() + timeout
        while reading := [pipe for pipe in self._pipes if pipe is not None]:
            ready = select.select(reading, [], [], max(0.0, deadline - time.monotonic()))[0]
            if not ready:
                raise subprocess.TimeoutExpired(str(self.pid), timeout, output=b"".join(said.values()))
            for pipe in ready:
                said[pipe] += (data := os.read(pipe, 1 << 16))
                if not data:
                    os.close(pipe)
                    self._pipes[self._pipes.index(pipe)] = None
        self.wait(max(0.0, deadline - time.monotonic()))
        stdout, stderr = (text.decode() for text in [*said.values(), b"", b""][:2])
        return stdout, stderr


class WarmPrograms:
    """Starts programs; one warm interpreter, made when the first is wanted, stands behind all of them."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def start(
        self,
        command: Sequence[str],
        *,
        env: dict[str, str] | None = None,
        output: Any = None,
        constants: dict[str, float] | None = None,
        namespace: str = "",
    ) -> Any:
        """`command` as of `command()`, with more environment; `output` is PIPE, for stdout and stderr apart, or a file.

        `constants`: {"anchor_node.service.GRACE_S": 2.0}, waits to be shortened in it and its children, unless COLD.
        `namespace`: the network namespace to run in, by its name.
        """
        environment = {**ENVIRONMENT, **(env or {})}
        if COLD:
            prefix = ["ip", "netns", "exec", namespace] if namespace else []
            return subprocess.Popen([*prefix, *command], env=environment, stdout=output, stderr=output, text=True)
        with contextlib.ExitStack() as stack:
            pipes: list[int | None] = []
            outputs = [_output(output, pipes, stack) for _ in range(2)]
            request: dict[str, Any] = {"argv": list(command[2:]), "env": environment, "cwd": os.getcwd()}
            request |= {"constants": constants or {}, "namespace": namespace}
            answer, descriptors = self._ask(request, outputs)
        return Process(self, answer["pid"], descriptors[0], pipes)

    def run(self, command: Sequence[str], timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """To its end, as subprocess.run does with capture_output."""
        process = self.start(command, output=subprocess.PIPE)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        finally:
            process.kill()
            process.wait()
        return subprocess.CompletedProcess(list(command), process.returncode, stdout, stderr)

    def reap(self, pid: int) -> int:
        """The exit code of one that has ended; negative for a signal."""
        return int(self._ask({"reap": pid}, [])[0]["code"])

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()  # which ends the interpreter, and whoever is left of those that it has started
            self._interpreter.wait()
            self._socket = None

    def _ask(self, request: dict[str, Any], descriptors: list[int]) -> tuple[dict[str, Any], list[int]]:
        if self._socket is None:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                me = [sys.executable, __file__, str(theirs.fileno())]
                self._interpreter = subprocess.Popen(me, env=ENVIRONMENT, pass_fds=[theirs.fileno()])
        socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
        data, received, _, _ = socket.recv_fds(self._socket, LARGEST_REQUEST, 1)
        assert data, "the warm interpreter is gone; its reason stands above"
        return json.loads(data), received


def _output(where: Any, pipes: list[int | None], stack: contextlib.ExitStack) -> int:
    """The descriptor that a program is to write to; what the test reads of it is added to `pipes`."""
    if where is not subprocess.PIPE:
        return int(where.fileno())
    read, write = os.pipe()
    stack.callback(os.close, write)
    pipes.append(read)
    return write


# In the warm interpreter, and in what it forks -------------------------------------------------------------------------


def serve(asked: socket.socket) -> None:
    """Fork and reap as asked, until the test is gone."""
    from swarm_core.exits import quiet_grpc

    quiet_grpc()
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()  # so that pages stay shared
    alive: dict[int, Forked] = {}
    while True:
        data, descriptors, _, _ = socket.recv_fds(asked, LARGEST_REQUEST, 2)
        if not data:
            break
        request = json.loads(data)
        if "reap" in request:
            asked.send(json.dumps({"code": alive.pop(request["reap"]).wait()}).encode())
            continue
        child = Forked(
            ["", "-m", *request["argv"]], env=request["env"], stdout=descriptors[0], stderr=descriptors[1],
            preexec_fn=functools.partial(_prepare, request),
        )  # fmt: skip
        alive[child.pid] = child
        process = os.pidfd_open(child.pid)
        socket.send_fds(asked, [json.dumps({"pid": child.pid}).encode()], [process])
        for descriptor in (*descriptors, process):
            os.close(descriptor)
    for child in alive.values():
        child.kill()


class Forked:
    """What `swarm_worker local` uses of subprocess.Popen, for [python, -m, PROGRAM.cli, ...] without a new interpreter."""

    def __init__(
        self,
        command: list[str],
        *,
        env: dict[str, str],
        stdout: Any = None,
        stderr: Any = None,
        stdin: Any = None,
        start_new_session: bool = False,
        preexec_fn: Callable[[], None] | None = None,
    ) -> None:
        threads = os.listdir("/proc/self/task")
        assert len(threads) == 1, f"{len(threads)} threads: no library may start one while it is imported"
        self.returncode: int | None = None
        outputs = [number if to is None else to for number, to in ((1, stdout), (2, stderr))]
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                if start_new_session:
                    os.setsid()
                if preexec_fn is not None:
                    preexec_fn()
                _become(command[2:], env, [to if isinstance(to, int) else to.fileno() for to in outputs])
                code = _run(command[2])
            finally:
                ctypes.pythonapi.Py_Exit(code)  # the end of an interpreter, from wherever this one was forked

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _prepare(request: dict[str, Any]) -> None:
    os.chdir(request["cwd"])
    if request["namespace"]:
        with open(f"/run/netns/{request['namespace']}") as namespace:
            entered = ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET)
        assert entered == 0, os.strerror(ctypes.get_errno())
    for name, value in request["constants"].items():
        module, _, constant = name.rpartition(".")
        assert hasattr(sys.modules[module], constant), name
        setattr(sys.modules[module], constant, value)


def _become(argv: list[str], env: dict[str, str], outputs: list[int]) -> None:
    """What a new interpreter has of its own: signals, descriptors, environment, arguments, chance."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    copies = [os.open(os.devnull, os.O_RDONLY), *map(os.dup, outputs)]
    for number, descriptor in enumerate(copies):
        os.dup2(descriptor, number)
    os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)
    os.environ.clear()
    os.environ.update(env)
    sys.argv, sys.path[0] = list(argv), os.getcwd()
    random.seed()
    from swarm_worker import local

    ours = types.SimpleNamespace(Popen=Forked, run=subprocess.run, DEVNULL=subprocess.DEVNULL)
    local.subprocess = ours  # type: ignore[assignment]


def _run(module: str) -> int:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as an interpreter does: it is said, and the exit code is 1
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
