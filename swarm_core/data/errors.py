"""The errors of data files and prompts: one root, typed fields, messages that say what to do. No other code lives here."""

from __future__ import annotations

from pathlib import Path

from swarm_core.errors import UserError


class DataError(UserError):
    """Root of everything that is wrong with data."""


class FileError(DataError):
    """A problem at one place of one file; `line` counts from 1, None when it is the file as a whole."""

    def __init__(self, path: Path, line: int | None, problem: str) -> None:
        self.path = path
        self.line = line
        self.problem = problem
        super().__init__(f"{path}: {problem}" if line is None else f"{path}:{line}: {problem}")

    def __reduce__(self) -> tuple[type, tuple[Path, int | None, str]]:
        return type(self), (self.path, self.line, self.problem)


class DatasetError(FileError):
    """A data file cannot be used; `line` counts rows for Parquet."""
