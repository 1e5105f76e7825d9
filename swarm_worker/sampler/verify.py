"""Reward functions in processes of their own, so that one that raises, hangs or dies costs one answer, not the run.

No reward is defined here (swarm_core.learning.rewards has them) and nothing is generated here.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Literal, Self

from swarm_worker.sampler.errors import VerifierError

LONGEST_DETAIL = 200  # letters of an error that are told: it becomes one line of a table
START_LIMIT_S = 120.0  # a first import of a heavy verifier on a cold disk takes tens of seconds
Outcome = Literal["scored", "declined", "raised", "timed_out", "died", "invalid"]
OUTCOMES: tuple[Outcome, ...] = ("scored", "declined", "raised", "timed_out", "died", "invalid")


@dataclass(frozen=True)
class Call:
    """One completion to be judged; `columns` are more named arguments of the function, `answer` among them."""

    prompt: Any
    completion: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """`reward` is None unless the outcome is "scored"; `detail` says what went wrong, for a person to read."""

    reward: float | None
    outcome: Outcome
    detail: str = ""


def failures(verdicts: Sequence[Verdict]) -> str:
    """The calls that gave no reward, by outcome with the most frequent detail, as one line; "" when all is well.

    A verifier may decline single answers; one that declines every answer is told too.
    """
    found = Counter(verdict.outcome for verdict in verdicts)
    parts = []
    for outcome in OUTCOMES[1:]:
        if not found[outcome] or (outcome == "declined" and found[outcome] < len(verdicts)):
            continue
        detail = Counter(v.detail for v in verdicts if v.outcome == outcome).most_common(1)[0][0]
        text = f"{found[outcome]} of {len(verdicts)} verifier calls {outcome.replace('_', ' ')}"
        parts.append(text + (f": {' '.join(detail.split())[:LONGEST_DETAIL]}" if detail else ""))
    return "; ".join(parts)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    started_s: float
    ready: bool = False
    job: int | None = None
    deadline_s: float = math.inf


class VerifierPool:
    """Runs one reward function, named as in `swarm_core.learning.rewards.resolve`, in `processes` spawned processes.

    The function has TRL's signature `f(prompts, completions, **columns) -> list[float | None]` and gets one completion
    a call, each with `limit_s` seconds. A call that raises, runs past its limit, ends its process, or answers anything
    but one finite number or None, gives None; the outcome is counted in `counts`, a lost process is replaced, and the
    other calls do not notice. The processes stand outside the terminal's group: Ctrl-C does not reach them, so a
    batch being judged is judged to its end by whoever drains; they end with the pool, and when this process dies.
    """

    def __init__(self, reward: str, *, processes: int = 2, limit_s: float = 10.0) -> None:
        if processes < 1 or not limit_s > 0:
            raise VerifierError(f"processes={processes}, limit_s={limit_s}: wanted processes >= 1 and limit_s > 0")
        self.reward = reward
        self.limit_s = limit_s
        self.counts: Counter[Outcome] = Counter(dict.fromkeys(OUTCOMES, 0))
        self._size = processes
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes. The pool may be used again: it starts new ones."""
        while self._workers:
            self._end(self._workers[0])

    def score(self, calls: Sequence[Call]) -> list[Verdict]:
        """One verdict a call, in the order of the calls.

        Raises VerifierError when the function cannot be found or imported at all.
        """
        verdicts: dict[int, Verdict] = {}
        waiting = deque(range(len(calls)))
        try:
            while len(verdicts) < len(calls):
                self._staff(min(self._size, len(calls) - len(verdicts)))
                self._assign(calls, waiting, verdicts)
                for job, verdict in self._next_events():
                    verdicts[job] = verdict
        except BaseException:
            self.close()  # answers still under way must not be taken for those of a later call
            raise
        self.counts.update(verdict.outcome for verdict in verdicts.values())
        return [verdicts[index] for index in range(len(calls))]

    def _staff(self, wanted: int) -> None:
        while len(self._workers) < wanted:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs, self.reward), daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, time.monotonic()))

    def _assign(self, calls: Sequence[Call], waiting: deque[int], verdicts: dict[int, Verdict]) -> None:
        for worker in [w for w in self._workers if w.ready and w.job is None]:
            while waiting and worker.job is None:
                job = waiting.popleft()
                call = calls[job]
                try:
                    worker.pipe.send((call.prompt, call.completion, dict(call.columns)))
                except OSError:  # it died between two calls: no fault of this one
                    waiting.appendleft(job)
                    self._end(worker)
                    break
                except Exception as error:  # noqa: BLE001 - pickling runs code of whatever is in the columns
                    verdicts[job] = Verdict(None, "invalid", f"the call cannot be sent: {error}")
                    continue
                worker.job, worker.deadline_s = job, time.monotonic() + self.limit_s

    def _next_events(self) -> Iterator[tuple[int, Verdict]]:
        """Waits for the next answer, death or deadline, and yields the calls that it settles."""
        busy = [worker for worker in self._workers if worker.job is not None or not worker.ready]
        if not busy:
            return
        limits = [w.deadline_s if w.ready else w.started_s + START_LIMIT_S for w in busy]
        ready = wait([w.pipe for w in busy], timeout=max(0.0, min(limits) - time.monotonic()))
        now = time.monotonic()
        for worker, limit in zip(busy, limits, strict=True):
            job = worker.job
            if worker.pipe in ready:
                verdict = self._receive(worker)
            elif now >= limit:
                verdict = self._overdue(worker)
            else:
                continue
            if job is not None and verdict is not None:
                yield job, verdict

    def _receive(self, worker: _Worker) -> Verdict | None:
        try:
            kind, value = worker.pipe.recv()
        except Exception:  # noqa: BLE001 - closed, or cut off in the middle of an answer
            code = self._end(worker)
            if not worker.ready:
                raise VerifierError(
                    f"the process for reward {self.reward!r} ended with code {code} while it started"
                ) from None
            return Verdict(None, "died", f"the process ended with code {code}")
        if kind == "failed":
            raise VerifierError(f"reward {self.reward!r} cannot be used: {value}")
        if kind == "ready":
            worker.ready = True
            return None
        worker.job, worker.deadline_s = None, math.inf
        return Verdict(None, "raised", value) if kind == "raised" else _judge(value)

    def _overdue(self, worker: _Worker) -> Verdict:
        self._end(worker)
        if not worker.ready:
            raise VerifierError(f"the process for reward {self.reward!r} did not start within {START_LIMIT_S:.0f} s")
        return Verdict(None, "timed_out", f"no answer within {self.limit_s:g} s")

    def _end(self, worker: _Worker) -> int | None:
        """Ends a process and all that it has started; returns its exit code."""
        self._workers.remove(worker)
        worker.pipe.close()
        pid = worker.process.pid
        if pid is not None and worker.process.is_alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(pid) == pid:  # once it runs it leads a group of its own
                    os.killpg(pid, signal.SIGKILL)
            worker.process.kill()
        worker.process.join(5.0)
        return worker.process.exitcode


def _judge(value: Any) -> Verdict:
    """The function answered; is it one number or None?"""
    if not isinstance(value, list | tuple) or len(value) != 1:
        return Verdict(None, "invalid", f"wanted a list of one number, got {str(value)[:100]}")
    if value[0] is None:
        return Verdict(None, "declined")
    try:
        number = float(value[0])
    except (TypeError, ValueError):
        return Verdict(None, "invalid", f"wanted a number, got {str(value[0])[:100]}")
    if not math.isfinite(number):
        return Verdict(None, "invalid", f"the reward is {number}")
    return Verdict(number, "scored")


def _plain(value: Any) -> Any:
    """What the function returned, in builtin types: nothing of the verifier's own is unpickled by the parent."""
    if not isinstance(value, str):
        with contextlib.suppress(TypeError, ValueError):
            return [None if item is None else float(item) for item in value]
    return repr(value)[:200]


def _serve(pipe: Connection, reward: str) -> None:
    """The life of a process of the pool."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        function = importlib.import_module("swarm_core.learning.rewards").resolve(reward)
    except BaseException as error:  # noqa: BLE001 - importing runs the user's code
        pipe.send(("failed", f"{type(error).__name__}: {error}"))
        return
    pipe.send(("ready", None))
    while True:
        try:
            prompt, completion, columns = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            columns = {name: [value] for name, value in columns.items()}
            answer = _plain(function(prompts=[prompt], completions=[completion], **columns))
        except SystemExit as error:
            pipe.send(("raised", f"SystemExit: {error}"))
        except BaseException as error:  # noqa: BLE001 - so does this
            pipe.send(("raised", f"{type(error).__name__}: {error}"))
        else:
            pipe.send(("answer", answer))
        sys.stdout.flush()


def _die_with_parent() -> None:
    """A verifier that hangs does not outlive the process that asked."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)
