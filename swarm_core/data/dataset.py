"""Rows of prompts and answers out of JSONL and Parquet files, and the order in which batches use them.

No tokenizer, no reward and no model lives here.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from swarm_core.data.errors import DatasetError
from swarm_core.learning.rewards import final_answer

Message = dict[str, str]
Prompt = str | list[Message]

PROMPT_COLUMNS = ("prompt", "question", "problem")
ANSWER_COLUMNS = ("answer", "ground_truth", "solution")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True)
class Row:
    """One problem.

    `prompt` is plain text or a list of chat messages (`{"role", "content"}`). `answer` is the final answer alone: of a
    worked solution what follows `####` (GSM8K) or stands in the last `\\boxed{}` (MATH, Big-Math), else the text as
    it is. `columns` are all other fields of the row, handed to the reward function as they are; the text that
    `answer` was taken from is there too, under its own name, unless that name is `answer`.
    """

    prompt: Prompt
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict)


def load_rows(path: str | Path, *, limit: int | None = None) -> list[Row]:
    """All rows of a `.jsonl` (also `.json`, `.ndjson`: one object a line) or `.parquet` file, in file order.

    The prompt is the first of the columns `prompt`, `question`, `problem` that the row has; the answer the first of
    `answer`, `ground_truth`, `solution`. Blank lines are passed over. `limit` keeps the first rows only.

    Raises DatasetError, with file and line, when the file is missing, of another kind, broken or without any row, or
    when a row has no prompt or no answer.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise DatasetError(path, None, f"limit is {limit}, wanted at least 1")
    if not path.is_file():
        raise DatasetError(path, None, "no such file; give the path of a .jsonl or .parquet file")
    if path.suffix == ".parquet":
        records = _parquet_records(path)
    elif path.suffix in JSON_SUFFIXES:
        records = _json_records(path)
    else:
        raise DatasetError(path, None, f"unknown kind of file {path.suffix!r}, wanted .jsonl or .parquet")
    rows: list[Row] = []
    for line, record in records:
        rows.append(_row(path, line, record))
        if len(rows) == limit:
            break
    if not rows:
        raise DatasetError(path, None, "the file holds no row; it needs at least one with a prompt and an answer")
    return rows


def prompt_indices(rows: int, seed: int, batch: int, size: int) -> list[int]:
    """The `size` row indices of rollout batch number `batch` (from 0): a pure function of its arguments.

    Every pass over the data (epoch) is a permutation of its own; batches cut the endless row of permutations in
    pieces of `size`, across the seams. So any two runs with the same seed agree, and a run that resumes at batch b
    skips nothing and repeats nothing: the number b is the whole cursor.

    Raises ValueError on a number out of range.
    """
    if rows < 1 or size < 1 or batch < 0:
        raise ValueError(f"rows={rows}, size={size}, batch={batch}: wanted rows >= 1, size >= 1, batch >= 0")
    first = batch * size
    return [_permutation(rows, seed, place // rows)[place % rows] for place in range(first, first + size)]


@lru_cache(maxsize=4)
def _permutation(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def _json_records(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DatasetError(path, line, f"not UTF-8: {error.reason} at byte {error.start}") from error
            if not text.strip():
                continue
            try:
                yield line, json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DatasetError(path, line, f"broken JSON ({error}); wanted one object on each line") from error


def _parquet_records(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DatasetError(path, None, "reading Parquet needs pyarrow; install it or use JSONL") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            line = 0
            for piece in file.iter_batches():
                for record in piece.to_pylist():
                    line += 1
                    yield line, record
    except (pyarrow.ArrowException, OSError) as error:
        raise DatasetError(path, None, f"broken Parquet: {error}") from error


def _row(path: Path, line: int, record: Any) -> Row:
    if not isinstance(record, dict):
        raise DatasetError(path, line, f"a row must be an object with named columns, got {type(record).__name__}")
    prompt_column = _first_present(record, PROMPT_COLUMNS)
    if prompt_column is None:
        raise _missing(path, line, record, "prompt", PROMPT_COLUMNS)
    answer_column = _first_present(record, ANSWER_COLUMNS)
    if answer_column is None:
        raise _missing(path, line, record, "answer", ANSWER_COLUMNS)
    answer = final_answer(_answer_text(path, line, answer_column, record[answer_column]))
    if not answer:
        raise DatasetError(path, line, f"the answer in {answer_column!r} is empty")
    columns = {name: value for name, value in record.items() if name not in (prompt_column, "answer")}
    return Row(_prompt(path, line, prompt_column, record[prompt_column]), answer, columns)


def _first_present(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first named column that holds something (null, NaN and blank text are nothing)."""
    for name in names:
        value = record.get(name)
        if isinstance(value, str):
            value = value.strip()
        if value is None or value in ("", []) or (isinstance(value, float) and math.isnan(value)):
            continue
        return name
    return None


def _missing(path: Path, line: int, record: Mapping[str, Any], what: str, names: Sequence[str]) -> DatasetError:
    have = ", ".join(sorted(str(name) for name in record)) or "none"
    return DatasetError(path, line, f"no {what}: wanted a filled column {' or '.join(names)}; this row has: {have}")


def _answer_text(path: Path, line: int, column: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # an integer column with gaps comes out of Parquet as floats
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DatasetError(path, line, f"{column!r} is a {type(value).__name__}, wanted text or a number")


def _prompt(path: Path, line: int, column: str, value: Any) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    ):
        return [{"role": m["role"], "content": m["content"]} for m in value]
    raise DatasetError(path, line, f"{column!r} must be text or a list of messages with role and content")
