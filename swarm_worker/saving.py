"""The writing of a stage's checkpoints while ticks go on: a snapshot in, a shard on disk and one word about it out.

The compute thread only copies its tensors; a thread of its own serialises, syncs, hashes and renames. Two things hold:

- every checkpoint that was decided is written, as one is complete only with the shards of all stages: where the next one
  falls due while one is being written, `room` is waited for;
- a shard is on disk before the redo log counts on it, and the log has noted it before the anchor hears of it: with its
  word that a checkpoint is complete older ones go, from which a stage that dies now would have to be rebuilt.

It outlives epochs: what is under way when one is cut off is finished before anybody is told what this stage holds.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from swarm_core.wire.messages import Saved
from swarm_worker.redo import Redo
from swarm_worker.shard import Shard, ShardWriter
from swarm_worker.vitals import Toil

log = logging.getLogger(__name__)


class Saving:
    """One stage's, in one process. Its methods are called from the event loop; `thread` is the one that has the log."""

    def __init__(self, shards: ShardWriter, redo: Redo, thread: Executor) -> None:
        self.shards = shards
        self._redo, self._log_thread = redo, thread
        self.toil = Toil(who="the writer of checkpoints")
        self.said: Callable[[Saved], None] = lambda saved: None
        self.failed: Callable[[BaseException], None] = lambda error: None
        self._thread = DaemonThread()
        self._task: asyncio.Task[None] | None = None
        self._tick = 0  # of what is being written
        self.awaited = ""  # what a tick waits for, in words

    def waiting(self) -> str:
        """What is being written, in words; empty: nothing."""
        return f"the shard of tick {self._tick}, which is being written" if self._busy else ""

    @property
    def _busy(self) -> bool:
        return self._task is not None and not self._task.done()

    async def room(self, tick: int) -> None:
        """Wait until the checkpoint of this tick can be begun."""
        if self._busy:
            self.awaited = self.waiting()
            log.warning("the checkpoint of tick %d waits for %s", tick, self.awaited)
        try:
            await self.idle()
        finally:
            self.awaited = ""

    async def idle(self) -> None:
        """Wait until nothing is being written. Raises ShardError where the last one could not be."""
        if self._task is not None:
            await asyncio.wait({self._task})  # and where this is cut off, the writing is not
            self._task.result()

    def begin(self, tick: int, shard: Shard) -> None:
        """Write a snapshot; there is room for it."""
        assert not self._busy, "one at a time"
        self._tick = tick
        self._task = asyncio.get_running_loop().create_task(self._write(tick, shard))
        self._task.add_done_callback(self._done)

    async def _write(self, tick: int, shard: Shard) -> None:
        loop = asyncio.get_running_loop()
        with self.toil.over("writing a shard"):
            saved = await loop.run_in_executor(self._thread, self.shards.write, tick, shard)
        await loop.run_in_executor(self._log_thread, self._redo.settle, tick, saved.digest, self.shards.keep)
        self.said(saved)

    def _done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failed(error)

    async def close(self, wait_s: float) -> None:
        """When this process leaves: what is under way is finished first, unless that takes too long."""
        if self._busy and self._task is not None:
            log.warning("leaving once %s", self.waiting())
            done, _ = await asyncio.wait({self._task}, timeout=wait_s)
            if not done:
                log.error("%s is given up after %.0f s", self.waiting(), wait_s)
                self._task.cancel()


NICENESS = 10  # of the writer: where cores are few, a tenth of one while ticks are computed


class DaemonThread(Executor):
    """A thread for each call, behind all others, which an exit of the process does not wait for: a disk may hang."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        """Start it at once."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            if sys.platform.startswith("linux"):  # elsewhere this number is no thread's
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
            try:
                future.set_result(work(*arguments, **named))
            except BaseException as error:  # noqa: BLE001  it is raised where the result is awaited
                future.set_exception(error)

        threading.Thread(target=run, name="checkpoint", daemon=True).start()
        return future
