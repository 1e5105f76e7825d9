"""The errors of the sampler: one root, typed fields, messages that say what to do. No other code lives here."""

from __future__ import annotations

from pathlib import Path


class SamplerError(Exception):
    """Root of everything the sampler raises on purpose."""


class _FileError(SamplerError):
    """A problem at one place of one file."""

    def __init__(self, path: Path, line: int | None, problem: str) -> None:
        self.path = path
        self.line = line
        self.problem = problem
        super().__init__(f"{path}: {problem}" if line is None else f"{path}:{line}: {problem}")

    def __reduce__(self) -> tuple[type, tuple[Path, int | None, str]]:
        return type(self), (self.path, self.line, self.problem)


class DatasetError(_FileError):
    """A data file cannot be used; `line` counts from 1 (rows, for Parquet), None when it is the file as a whole."""


class ReplayError(_FileError):
    """A file of recorded rollouts cannot be used, or a batch cannot be appended to it."""


class EngineError(SamplerError):
    """An engine was asked for something it cannot do, or was given weights that are not this model's."""


class VerifierError(SamplerError):
    """The reward function cannot be run at all (not found, import fails): a mistake to repair, not a failed answer."""
