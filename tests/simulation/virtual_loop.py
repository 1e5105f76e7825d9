"""An event loop without a clock of its own: time jumps to the next timer, work for threads is done in line, and what runs
belongs to a process that can be killed or frozen. No network, no file, nothing of a swarm.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import random
import selectors
from collections.abc import Callable, Coroutine
from typing import Any


class Died(BaseException):
    """kill -9: nothing of the process runs any more."""


class Stuck(AssertionError):
    """Nothing is left that could happen, and the run is not over."""


class Process:
    """Tasks with a common fate. What they have on disk stays, and is somebody else's."""

    def __init__(self, loop: VirtualLoop, name: str, host: str) -> None:
        self.loop, self.name, self.host = loop, name, host
        self.alive, self.frozen_until = True, 0.0
        self.context = contextvars.copy_context()
        self.context.run(CURRENT.set, self)
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self.at_death: list[Callable[[], None]] = []

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return self.loop.create_task(work, context=self.context)

    def kill(self) -> None:
        """From now on nothing that it does has an effect; its tasks are cut off where they stand."""
        if self.alive:
            self.alive = False
            for task in list(self.tasks):
                task.cancel()
            for tell in self.at_death:
                tell()


CURRENT: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class _Task(asyncio.Task[Any]):
    """Hashed by number, so that sets of tasks have the same order in every run of a seed."""

    _numbers = itertools.count()

    def __init__(self, *args: Any, **keywords: Any) -> None:
        self._mine = next(_Task._numbers)
        super().__init__(*args, **keywords)

    def __hash__(self) -> int:
        return self._mine

    def __eq__(self, other: object) -> bool:
        return self is other


class _Jump(selectors.SelectSelector):
    """Waiting is what moves the clock."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Stuck("nothing is left that could happen")
        if timeout > 0:
            self.loop.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Everything random about it is drawn from `rng`."""

    def __init__(self, rng: random.Random) -> None:
        selector = _Jump()
        super().__init__(selector)
        selector.loop = self
        self.now, self.rng = 0.0, rng
        self.work_s: Callable[[Process | None, Any], float] = lambda process, executor: 0.01
        self.done_at_end: Callable[[Any], bool] = lambda executor: False
        self._busy_until: dict[Any, float] = {}
        self.set_task_factory(self._make_task)  # type: ignore[arg-type]

    def time(self) -> float:
        return self.now

    def _make_task(self, loop: Any, work: Any, **keywords: Any) -> _Task:
        task = _Task(work, loop=loop, **keywords)
        context = keywords.get("context")
        process = context.get(CURRENT) if context is not None else CURRENT.get()
        if process is not None:
            process.tasks[task] = None
            task.add_done_callback(lambda done: process.tasks.pop(done, None))
            if not process.alive:
                task.cancel()
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """One piece after the other for each executor. It is done at its start, and known of at its end; or it is done at
        its end, so that a process that dies meanwhile has not done it."""
        process, result = CURRENT.get(), self.create_future()
        starts = max(self.now, self._busy_until.get(executor, 0.0) if executor is not None else 0.0)
        lasts = self.work_s(process, executor)
        if executor is not None:
            self._busy_until[executor] = starts + lasts

        def end(done: Callable[[Any], None], value: Any) -> None:
            if not result.done() and (process is None or process.alive):
                done(value)

        def start(again_s: float) -> None:
            if result.cancelled() or process is not None and not process.alive:
                return
            if process is not None and process.frozen_until > self.now:
                self.call_at(process.frozen_until, start, again_s)
                return
            if again_s:
                self.call_later(again_s, start, 0.0)
                return
            try:
                value, done = func(*args), result.set_result
            except Died:
                return
            except Exception as error:  # noqa: BLE001  whatever it is, it is told to whoever waits for it
                value, done = error, result.set_exception
            self.call_later(0.0 if late else lasts, end, done, value)

        late = self.done_at_end(executor)
        self.call_at(starts, start, lasts if late else 0.0)
        return result
