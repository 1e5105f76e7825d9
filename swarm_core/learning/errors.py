"""The errors of the learning room. One root; the message says what, what was got, what was wanted and what to do."""

from __future__ import annotations

from swarm_core.errors import UserError


class LearningError(UserError, ValueError):
    """Root of the errors raised by `swarm_core.learning`."""


class UnfitError(LearningError):
    """Something that does not fit, in the house's four parts. Fields: what, got, wanted, todo."""

    def __init__(self, what: str, got: object, wanted: object, todo: str) -> None:
        super().__init__(f"{what}: got {got}, wanted {wanted}; {todo}")
        self.what, self.got, self.wanted, self.todo = what, got, wanted, todo


class MicrobatchError(LearningError):
    """Samples or columns that cannot form a microbatch. `field` names the offending column."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"microbatch, {field}: {message}")
        self.field = field


class LossError(LearningError):
    """A loss specification or its inputs that do not fit together. `field` names the offending value."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"loss, {field}: {message}")
        self.field = field


class RolloutError(LearningError):
    """Rollout data that breaks its own rules. `position` is the completion in `batch`, None for all of it."""

    def __init__(self, batch: int, position: int | None, message: str) -> None:
        where = f"rollout batch {batch}" if position is None else f"rollout batch {batch}, completion {position}"
        super().__init__(f"{where}: {message}")
        self.batch = batch
        self.position = position


class RewardError(LearningError):
    """A reward function that is unknown, cannot be imported or breaks the contract. `name` is the one asked for."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"reward function {name!r}: {message}")
        self.name = name


class GateError(LearningError):
    """A gradient gate given impossible values or a verdict that was judged against another state."""
