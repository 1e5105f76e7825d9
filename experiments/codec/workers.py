"""Jobs in processes of their own, as many side by side as asked for, rows into a results file. Knows no job's work.

Spawned: never a fork after torch has computed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol, TypeVar

from experiments.codec import results
from swarm_core.errors import UserError


class Task(Protocol):
    """What is known of a job here. `key` is what `results.key` says of its row."""

    @property
    def name(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def key(self) -> Hashable: ...


J = TypeVar("J", bound=Task)
Row = dict[str, Any]
Run = Callable[[J, Path], Row]  # of a module: it is found again by its name in another process


def run_missing(jobs: Sequence[J], run: Run[J], file: Path, workers: int, figures: Callable[[Row], str]) -> int:
    """Run the jobs whose rows `file` does not have yet, a line each; how many failed. Ctrl-C loses what is under way."""
    done = {results.key(row) for row in results.read(file)}
    waiting = [job for job in jobs if job.key not in done]
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them done already", flush=True)
    failed, started = 0, time.monotonic()
    with contextlib.closing(run_all(waiting, run, file.parent / "runs", workers)) as outcomes:
        for number, (job, row, error) in enumerate(outcomes, start=1):
            left_s = (time.monotonic() - started) / number * (len(waiting) - number)
            head = f"{number}/{len(waiting)} {job.name} seed {job.seed}"
            if row is None:
                failed += 1
                print(f"{head}: FAILED: {error}", file=sys.stderr, flush=True)
                continue
            results.append(file, row)
            print(f"{head}: {figures(row)}; {left_s / 60:.0f} min left", flush=True)
    return failed


def run_all(
    jobs: Sequence[J], run: Run[J], folder: Path, workers: int
) -> Generator[tuple[J, Row | None, str], None, None]:
    """(job, its row or None, what went wrong) of each, as they finish. A run that fails costs its row, not the others.

    Closing the iterator, as Ctrl-C does, ends the processes with what they have under way. Raises BrokenProcessPool
    when one dies.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
    try:
        futures = [pool.submit(_guarded, run, job, folder) for job in jobs]
        for future in as_completed(futures):
            yield future.result()
    finally:
        processes = multiprocessing.active_children()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()


def seeds_of(text: str) -> list[int]:
    """The seeds of "0-4" or "0,2,7". Raises UserError."""
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            seeds += range(int(first), int(last or first) + 1)
    except ValueError:
        raise UserError(f"--seeds {text}: wanted numbers as 0-4 or 0,2,7") from None
    return seeds


def _begin() -> None:
    """Ctrl-C is the parent's business, and loading a model is no event."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import transformers

    transformers.utils.logging.disable_progress_bar()


def _guarded(run: Run[J], job: J, folder: Path) -> tuple[J, Row | None, str]:
    try:
        return job, run(job, folder), ""
    except UserError as error:
        return job, None, str(error)
    except Exception:  # noqa: BLE001 - the parent shows it with its trace
        return job, None, traceback.format_exc()
