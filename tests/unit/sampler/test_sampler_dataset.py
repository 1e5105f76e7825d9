"""Data files: what is read, what is refused and how, and the order of prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_core.data.dataset import Row, load_rows, prompt_indices
from swarm_core.data.errors import DataError, DatasetError


def written(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_plain_rows_keep_their_other_columns(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"prompt": "1+1=", "answer": 2, "level": 3})
    assert load_rows(path) == [Row("1+1=", "2", {"level": 3})]


def test_gsm8k_answers_are_what_follows_the_marks(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"question": "How many?", "answer": "40 + 2 = <<40+2=42>>42\n#### 42"})
    assert load_rows(path) == [Row("How many?", "42", {})]


def test_big_math_and_boxed_solutions(tmp_path: Path) -> None:
    big_math = {"problem": "p", "answer": "\\frac{1}{2}", "source": "olympiads", "llama8b_solve_rate": 0.3}
    worked = {"problem": "q", "solution": "first \\boxed{1}, so \\boxed{\\frac{3}{4}}."}
    rows = load_rows(written(tmp_path / "a.jsonl", big_math, worked))
    assert rows[0] == Row("p", "\\frac{1}{2}", {"source": "olympiads", "llama8b_solve_rate": 0.3})
    assert rows[1].answer == "\\frac{3}{4}"
    assert rows[1].columns == {"solution": worked["solution"]}


def test_the_first_filled_column_counts(tmp_path: Path) -> None:
    record = {"prompt": None, "question": "q", "answer": "  ", "ground_truth": "7", "solution": "8"}
    assert load_rows(written(tmp_path / "a.jsonl", record))[0].prompt == "q"
    assert load_rows(written(tmp_path / "a.jsonl", record))[0].answer == "7"


def test_messages_are_prompts(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}]
    assert load_rows(written(tmp_path / "a.jsonl", {"prompt": messages, "answer": "2"}))[0].prompt == messages


def test_parquet_equals_jsonl(tmp_path: Path) -> None:
    columns = {"question": ["a", "b"], "answer": ["x #### 1", "#### 2"], "kind": ["k", None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    rows = load_rows(tmp_path / "a.parquet")
    assert rows == [Row("a", "1", {"kind": "k"}), Row("b", "2", {"kind": None})]


def test_parquet_numbers_with_gaps(tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": ["a", "b"], "answer": [41.0, float("nan")]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert load_rows(tmp_path / "a.parquet", limit=1)[0].answer == "41"
    with pytest.raises(DatasetError) as caught:
        load_rows(tmp_path / "a.parquet")
    assert caught.value.line == 2


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": "1"}\r\n\r\n{"prompt": "b", "answer": "2"}')
    assert [row.prompt for row in load_rows(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("second_line", "words"),
    [
        (b'{"answer": "1"}', ["no prompt", "prompt or question or problem", "answer"]),
        (b'{"prompt": "a"}', ["no answer", "answer or ground_truth or solution", "prompt"]),
        (b'{"prompt": "a", "answer": ""}', ["no answer"]),
        (b'{"prompt": "a", "answer": [1]}', ["'answer' is a list"]),
        (b'{"prompt": "a", "answer": true}', ["'answer' is a bool"]),
        (b'{"prompt": 3, "answer": "1"}', ["'prompt' must be text"]),
        (b'{"prompt": ["a"], "answer": "1"}', ["'prompt' must be text"]),
        (b'["a"]', ["must be an object", "list"]),
        (b'{"prompt": "a", ', ["broken JSON"]),
        (b"[" * 100_000, ["broken JSON"]),
        (b'{"prompt": "\xff"}', ["not UTF-8"]),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path, second_line: bytes, words: list[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "1"}\n' + second_line + b"\n")
    with pytest.raises(DatasetError) as caught:
        load_rows(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert (caught.value.path, caught.value.line) == (path, 2)
    assert isinstance(caught.value, DataError)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DatasetError, match="no row"):
        load_rows(tmp_path / "a.jsonl")


def test_missing_strange_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such file"):
        load_rows(tmp_path / "none.jsonl")
    (tmp_path / "a.csv").write_text("prompt,answer\n")
    with pytest.raises(DatasetError, match=r"unknown kind of file '\.csv'"):
        load_rows(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DatasetError, match="broken Parquet"):
        load_rows(tmp_path / "a.parquet")


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 40), seed=st.integers(0, 2**40), size=st.integers(1, 50), batches=st.integers(1, 8))
def test_every_epoch_is_a_permutation(rows: int, seed: int, size: int, batches: int) -> None:
    order = [index for batch in range(batches) for index in prompt_indices(rows, seed, batch, size)]
    assert len(order) == batches * size
    for first in range(0, len(order) - rows + 1, rows):
        assert sorted(order[first : first + rows]) == list(range(rows))


def test_a_batch_depends_on_its_number_alone() -> None:
    forward = [prompt_indices(100, 5, batch, 32) for batch in range(9)]
    assert [prompt_indices(100, 5, batch, 32) for batch in reversed(range(9))] == forward[::-1]
    assert prompt_indices(100, 6, 0, 32) != forward[0]
    assert prompt_indices(100, 5, 0, 100) != prompt_indices(100, 5, 1, 100)  # another order each epoch
    assert prompt_indices(10, 5, 0, 10) == [9, 6, 8, 0, 5, 2, 1, 4, 3, 7]  # the same on every machine, for ever


@pytest.mark.parametrize(("rows", "batch", "size"), [(0, 0, 1), (1, -1, 1), (1, 0, 0)])
def test_numbers_out_of_range_are_refused(rows: int, batch: int, size: int) -> None:
    with pytest.raises(ValueError, match="wanted rows >= 1"):
        prompt_indices(rows, 0, batch, size)
