"""What tests of several rooms share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from warm_programs import WarmPrograms


@pytest.fixture(scope="session")
def programs() -> Iterator[WarmPrograms]:
    """Starts our programs as processes, without the seconds of their imports."""
    warm = WarmPrograms()
    yield warm
    warm.close()
