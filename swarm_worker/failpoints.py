"""Named places where a stage can be made to die, for tests of recovery. Nothing happens there unless a test has asked for it.

`KEDGE_FAILPOINT=/folder/1-voting@12` kills stage 1 where it is about to vote on tick 12, as kill -9 would, and once: the file
of that name is made first, and where it is there nobody dies. Several are separated by commas.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

VARIABLE = "KEDGE_FAILPOINT"
POINTS = ("forward", "tallied", "voting", "decided", "applying", "applied", "saving", "saved")


def _by_environment(name: str, stage: int, tick: int) -> None:
    for marker in map(Path, os.environ.get(VARIABLE, "").split(",")):
        if marker.name == f"{stage}-{name}@{tick}" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


hit: Callable[[str, int, int], None] = _by_environment
