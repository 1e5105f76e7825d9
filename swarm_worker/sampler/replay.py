"""Rollouts recorded in a file, so that a run can be repeated without a sampler. No engine and no reward lives here.

The format is JSONL, UTF-8, one line a completion, with these fields (`row` may be missing) and no other:

| field | type | meaning |
|---|---|---|
| `batch` | int >= 0 | rollout batch; batches follow each other in rising order, the lines of one side by side |
| `group` | int >= 0 | which prompt of the batch: 0, 1, 2, ... in order, `group_size` lines each, side by side |
| `prompt_ids` | list of int | token ids of the prompt, the same in all lines of a group |
| `completion_ids` | list of int | sampled token ids, at least one, the end token included where there is one |
| `logprobs` | list of float or null | log-probability of each at the sampling temperature; null: not recorded |
| `reward` | float or null | null: the verifier failed |
| `truncated` | bool | the length limit came before an end token |
| `weight_version` | int >= 0 | version of the weights that sampled, the same in all lines of a batch |
| `row` | int >= 0 | row of the data file that the prompt is from, the same in all lines of a group; missing: `group` |

Floats are written so that they read back as the same bits.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from swarm_core.learning.rollout import Completion, RolloutBatch
from swarm_worker.sampler.errors import ReplayError

FIELDS = ("batch", "group", "prompt_ids", "completion_ids", "logprobs", "reward", "truncated", "weight_version")
OPTIONAL_FIELDS = ("row",)


class _Line(NamedTuple):
    number: int
    batch: int
    group: int
    weight_version: int
    completion: Completion


def read_rollouts(path: str | Path, group_size: int, *, groups: int | None = None) -> Iterator[RolloutBatch]:
    """The batches of a file, one at a time, so that a long record is never held whole.

    `groups`: how many prompts each batch must have (not checked where None). Raises ReplayError with file and line on
    anything that the format above does not allow, as soon as it is reached; a batch is yielded only when it is whole.
    """
    path = Path(path)
    if not path.exists() or path.is_dir():  # a named pipe will do: batches are read as they are asked for
        raise ReplayError(path, None, "no such file; give the path of a .jsonl file of recorded rollouts")
    lines: list[_Line] = []
    last_batch, torn = -1, False
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            torn = not raw.endswith(b"\n")
            if torn:
                break
            line = _parse(path, number, raw)
            if lines and line.batch != lines[0].batch:
                yield _assemble(path, lines, group_size, groups)
                last_batch, lines = lines[0].batch, []
            if line.batch <= last_batch:
                raise ReplayError(
                    path, line.number, f"batch {line.batch} after batch {last_batch}, wanted rising order"
                )
            lines.append(line)
    missing = groups is not None and len(lines) < groups * group_size
    if torn and not missing and groups is not None:  # the cut line was the first of another batch
        yield _assemble(path, lines, group_size, groups)
        last_batch, lines = lines[0].batch, []
    if torn or (missing and last_batch >= 0):
        raise _torn(path, lines, last_batch, number)
    if not lines:
        raise ReplayError(path, None, "the file holds no rollout")
    yield _assemble(path, lines, group_size, groups)


def _torn(path: Path, lines: list[_Line], last_batch: int, end: int) -> ReplayError:
    """The recorder was stopped while it wrote the last batch; every batch before it is whole."""
    batch, keep = (lines[0].batch, lines[0].number - 1) if lines else (last_batch + 1, end - 1)
    problem = f"batch {batch} is torn: the recording was stopped while it was written"
    todo = f"replay the whole batches before it: head -n {keep} {path} > whole.jsonl" if keep else "no batch is whole"
    return ReplayError(path, end, f"{problem}; {todo}, or record it again")


class ReplayWriter:
    """Appends batches to a record, durably: when `append` returns, the batch is on the disk.

    Opening a record that exists goes on behind its last batch. A tail that is not whole (the process was killed while
    it wrote) is cut off; everything before it stays as it is. Every batch has `groups` prompts: that is how a whole
    one is told from a torn one. `last_batch` is the newest whole batch, None when there is none.
    """

    def __init__(self, path: str | Path, group_size: int, groups: int) -> None:
        self.path = Path(path)
        if group_size < 1 or groups < 1:
            raise ReplayError(self.path, None, f"group_size={group_size}, groups={groups}: wanted at least 1 of each")
        self.group_size = group_size
        self.groups = groups
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.last_batch = _cut_torn_tail(self.path, group_size, groups) if self.path.exists() else None
        self._file = self.path.open("ab", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def append(self, batch: RolloutBatch) -> None:
        """Raises ReplayError, and writes nothing, on a batch out of order or with wrong group sizes."""
        if self.last_batch is not None and batch.batch <= self.last_batch:
            raise ReplayError(self.path, None, f"batch {batch.batch} after batch {self.last_batch}, wanted a later one")
        if batch.group_size != self.group_size:
            raise ReplayError(
                self.path, None, f"batch {batch.batch} has group size {batch.group_size}, wanted {self.group_size}"
            )
        text = "".join(json.dumps(_record(batch, place, c)) + "\n" for place, c in enumerate(batch.completions))
        lines = [_parse(self.path, None, line) for line in text.splitlines()]
        _assemble(self.path, lines, self.group_size, self.groups)  # what could not be read back is not written
        rest = memoryview(text.encode())
        while rest:
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())
        self.last_batch = batch.batch


def _record(batch: RolloutBatch, place: int, completion: Completion) -> dict[str, Any]:
    return {
        "batch": batch.batch,
        "group": place // batch.group_size,
        "prompt_ids": list(completion.prompt_ids),
        "completion_ids": list(completion.completion_ids),
        "logprobs": [None if math.isnan(value) else value for value in completion.logprobs],
        "reward": completion.reward,
        "truncated": completion.truncated,
        "weight_version": batch.weight_version,
        "row": completion.prompt_index,
    }


def _parse(path: Path, number: int | None, raw: bytes | str) -> _Line:
    try:
        record = json.loads(raw)
    except ValueError as error:
        raise ReplayError(path, number, f"broken JSON ({error}); wanted one object on each line") from error
    if not isinstance(record, dict) or set(record) - set(OPTIONAL_FIELDS) != set(FIELDS):
        have = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ReplayError(path, number, f"wanted an object with the fields {', '.join(FIELDS)}; got {have}")

    def check(name: str, good: bool, wanted: str) -> None:
        if not good:
            raise ReplayError(path, number, f"{name!r} is {str(record[name])[:60]!r}, wanted {wanted}")

    for name in ("batch", "group", "weight_version", *(name for name in OPTIONAL_FIELDS if name in record)):
        check(name, _is_count(record[name]), "an integer from 0 up")
    for name in ("prompt_ids", "completion_ids"):
        ids = record[name]
        check(name, isinstance(ids, list) and bool(ids) and all(map(_is_count, ids)), "a list of token ids, not empty")
    logprobs, reward = record["logprobs"], record["reward"]
    check(
        "logprobs",
        isinstance(logprobs, list) and all(v is None or _is_finite(v) for v in logprobs),
        "a list of numbers",
    )
    if len(logprobs) != len(record["completion_ids"]):
        problem = f"{len(logprobs)} logprobs for {len(record['completion_ids'])} completion_ids, wanted one for each"
        raise ReplayError(path, number, problem)
    check("reward", reward is None or _is_finite(reward), "a finite number or null")
    check("truncated", isinstance(record["truncated"], bool), "true or false")
    completion = Completion(
        prompt_index=record["row"] if "row" in record else record["group"],
        prompt_ids=record["prompt_ids"],
        completion_ids=record["completion_ids"],
        logprobs=[math.nan if value is None else float(value) for value in logprobs],
        reward=None if reward is None else float(reward),
        truncated=record["truncated"],
    )
    return _Line(number or 0, record["batch"], record["group"], record["weight_version"], completion)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _assemble(path: Path, lines: list[_Line], group_size: int, groups: int | None) -> RolloutBatch:
    """The lines of one batch as a RolloutBatch; line k belongs to group k // group_size, or the record is wrong."""
    if not lines:
        raise ReplayError(path, None, "a batch without any completion; wanted at least one group")
    batch, version = lines[0].batch, lines[0].weight_version
    for place, line in enumerate(lines):
        number = line.number or None
        wanted = place // group_size
        if line.group != wanted:
            problem = f"batch {batch}: line {place} of it is in group {line.group}, wanted {wanted}"
            raise ReplayError(path, number, f"{problem} (groups of {group_size}, in order)")
        if line.weight_version != version:
            problem = f"batch {batch}: weight_version {line.weight_version} beside {version}, wanted one for all"
            raise ReplayError(path, number, problem)
        first = lines[wanted * group_size].completion
        if (line.completion.prompt_index, line.completion.prompt_ids) != (first.prompt_index, first.prompt_ids):
            raise ReplayError(path, number, f"batch {batch}: two different prompts in group {line.group}")
    found, rest = divmod(len(lines), group_size)
    if rest:
        problem = f"batch {batch}: its last group has {rest} completions, wanted {group_size}"
        raise ReplayError(path, lines[-1].number or None, problem)
    if groups is not None and found != groups:
        raise ReplayError(path, lines[-1].number or None, f"batch {batch} has {found} groups, wanted {groups}")
    return RolloutBatch(
        batch=batch, weight_version=version, group_size=group_size, completions=[line.completion for line in lines]
    )


def _cut_torn_tail(path: Path, group_size: int, groups: int) -> int | None:
    """Cuts an unfinished last batch off; returns the number of the last batch that is left.

    Raises ReplayError when what comes before the last batch is not a record of batches of this size.
    """
    size = path.stat().st_size
    offset = keep = 0  # `keep`: bytes up to the end of the last whole batch
    last: int | None = None
    lines: list[_Line] = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            offset += len(raw)
            if offset == size and not raw.endswith(b"\n"):
                break
            lines.append(_parse(path, number, raw))
            if lines[-1].batch != lines[0].batch or (last is not None and lines[-1].batch <= last):
                before = lines[0].batch if len(lines) > 1 else last
                problem = f"batch {lines[-1].batch} comes behind {len(lines) - 1} lines of batch {before}"
                wanted = f"wanted batches of {groups} x {group_size} lines in rising order"
                raise ReplayError(path, number, f"{problem}; {wanted}: record to another file")
            if len(lines) == group_size * groups:
                last, keep = _assemble(path, lines, group_size, groups).batch, offset
                lines = []
    if keep != size:
        os.truncate(path, keep)
    return last


def cut_record(path: str | Path, from_batch: int) -> None:
    """Drop the batches at and after `from_batch` of a record: a resumed run draws them again. No file: nothing to do."""
    path = Path(path)
    if not path.exists():
        return
    temporary = path.with_suffix(".tmp")
    with path.open("rb") as file, temporary.open("wb") as kept:
        for raw in file:
            try:
                if int(json.loads(raw)["batch"]) >= from_batch:
                    break
            except (ValueError, KeyError, TypeError):
                break  # a torn tail
            kept.write(raw)
        kept.flush()
        os.fsync(kept.fileno())
    temporary.rename(path)
