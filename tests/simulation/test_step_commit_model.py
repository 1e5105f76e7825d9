"""The protocol on paper: every order of everything in small swarms, and seven bugs that the search must find."""

from __future__ import annotations

import os
from typing import Any

import pytest
from step_commit_model import BUGS, FULL, SMALL, search

# All configurations take a minute: `make test-faults`.
SEARCHED = SMALL + (FULL if os.environ.get("KEDGE_FULL") else FULL[:1])


@pytest.mark.parametrize("configuration", SEARCHED, ids=str)
def test_every_state_of_a_small_swarm_keeps_every_promise(configuration: dict[str, Any]) -> None:
    result, problem, states, steps = search(**configuration)
    assert result == "OK", f"{problem} after {' > '.join(steps)}"
    assert states > 500, "a search that sees nothing proves nothing"


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_the_protocol_is_found(bug: str) -> None:
    result, problem, _, steps = search(bug=bug, **BUGS[bug])
    assert result == "VIOLATION" and problem and steps
    assert search(**BUGS[bug])[0] == "OK", "and only the bug makes it wrong"
