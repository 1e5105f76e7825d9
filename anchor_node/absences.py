"""Members whose stream broke and who may come back: each has a while, and longer as long as the run goes on without a word
of it. Timers only; what is done about somebody who stays away is the caller's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

GRACE_S = 20.0  # a member dials again within 5 s of an anchor that answers, and a frozen link is noticed after 15 s


class Absences:
    """Who is away. `progress` is any number that moves while the run does: nobody who stands still in it is alive."""

    def __init__(self, progress: Callable[[], int]) -> None:
        self._progress = progress
        self._timers: dict[int, asyncio.Task[None]] = {}

    def add(self, member: int, gone: Callable[[], None], *, patient: bool) -> None:
        """Give a member GRACE_S to come back, then call `gone`. `patient`: begin anew as long as the run moves on."""
        self.back(member)
        self._timers[member] = asyncio.create_task(self._wait(member, gone, patient))

    async def _wait(self, member: int, gone: Callable[[], None], patient: bool) -> None:
        while True:
            before = self._progress()
            await asyncio.sleep(GRACE_S)
            if not patient or self._progress() == before:
                break
        del self._timers[member]
        gone()

    def back(self, member: int) -> None:
        """The member has come back, or is given up."""
        if (timer := self._timers.pop(member, None)) is not None:
            timer.cancel()

    def __contains__(self, member: int) -> bool:
        return member in self._timers

    def __len__(self) -> int:
        return len(self._timers)

    def clear(self) -> None:
        for member in list(self._timers):
            self.back(member)
