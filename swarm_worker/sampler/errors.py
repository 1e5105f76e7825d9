"""The errors of the sampler: one root, typed fields, messages that say what to do. No other code lives here."""

from __future__ import annotations

from swarm_core.data.errors import FileError
from swarm_core.errors import UserError


class SamplerError(UserError):
    """Root of everything the sampler raises on purpose."""


class ReplayError(FileError, SamplerError):
    """A file of recorded rollouts cannot be used, or a batch cannot be appended to it; `line` counts from 1."""


class EngineError(SamplerError):
    """An engine was asked for something it cannot do, or was given weights that are not this model's."""


class VerifierError(SamplerError):
    """The reward function cannot be run at all (not found, import fails): a mistake to repair, not a failed answer."""
