"""How a worker's health is told: what counts as started, ready and alive. Decides nothing; the service is in wire/health.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from swarm_core.wire.beats import Pulse
from swarm_core.wire.health import Health

if TYPE_CHECKING:
    from swarm_worker.worker import StageWorker

FIRST_S = 600.0  # for the first command of a kind: kernels are built, a checkpoint is written to a slow disk
LEAST_S, TIMES = 60.0, 20.0  # afterwards: so many times the longest of its kind, and never less than a minute
LOADING = "loading"


class Toil:
    """How long a thread is in its present command, and how long it may be. Read from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, who: str = "the compute thread") -> None:
        self._who, self._clock = who, clock
        self._longest: dict[str, float] = {}
        self._now: tuple[str, float] | None = None

    @contextmanager
    def over(self, kind: str) -> Iterator[None]:
        """A command of this kind is under way."""
        began = self._clock()
        self._now = (kind, began)
        try:
            yield
        finally:
            self._now = None
            self._longest[kind] = max(self._longest.get(kind, 0.0), self._clock() - began)

    def limit_s(self, kind: str) -> float:
        """How long a command of this kind may take."""
        longest_s = self._longest.get(kind)
        return FIRST_S if longest_s is None else max(LEAST_S, TIMES * longest_s)

    def stuck(self) -> str:
        """In what the thread is stuck, in words; empty while it is not."""
        if (now := self._now) is None:
            return ""
        kind, began = now
        age_s, limit_s = self._clock() - began, self.limit_s(kind)
        return f"{self._who} is in {kind} for {age_s:.0f} s, at most {limit_s:.0f} expected" if age_s > limit_s else ""


def watch_member(health: Health, pulse: Pulse) -> None:
    """From now on joined: a member waits in order until the start, and is ready as soon as its model is loaded."""
    health.startup = health.ready = lambda: (pulse.phase != LOADING, pulse.phase)


def watch_stage(health: Health, worker: StageWorker) -> None:
    """From now on at work. A stage that waits for another is ready: it is not its own fault, and it must stay dialled."""

    def ready() -> tuple[bool, str]:
        if worker.over.done():
            return False, "leaving"
        what, age_s = worker.awaits()
        return True, f"tick {worker.position.tick}" + (f", waiting {age_s:.0f} s for {what}" if what else "")

    def live() -> tuple[bool, str]:
        stuck = worker.work.toil.stuck() or worker.work.saving.toil.stuck()
        return not stuck, stuck or "the event loop answers, the compute thread moves"

    health.ready, health.live = ready, live
