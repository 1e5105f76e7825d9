"""Jobs in processes of their own, as many side by side as asked for. Spawned: never a fork after torch has computed."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from experiments.codec.job import Job, run_job
from swarm_core.errors import UserError

Outcome = tuple[Job, dict[str, Any] | None, str]


def run_all(jobs: Sequence[Job], folder: Path, workers: int) -> Iterator[Outcome]:
    """(job, its row or None, what went wrong) of each, as they finish. A run that fails costs its row, not the others.

    Closing the iterator, as Ctrl-C does, ends the processes with what they have under way. Raises BrokenProcessPool
    when one dies.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
    try:
        futures = [pool.submit(_guarded, job, folder) for job in jobs]
        for future in as_completed(futures):
            yield future.result()
    finally:
        processes = multiprocessing.active_children()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()


def _begin() -> None:
    """Ctrl-C is the parent's business, and loading a model is no event."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import transformers

    transformers.utils.logging.disable_progress_bar()


def _guarded(job: Job, folder: Path) -> Outcome:
    try:
        return job, run_job(job, folder), ""
    except UserError as error:
        return job, None, str(error)
    except Exception:  # noqa: BLE001 - the parent shows it with its trace
        return job, None, traceback.format_exc()
