"""Where a worker computes: what is asked for, or one readable line."""

from __future__ import annotations

import pytest
import torch

from swarm_core.errors import UserError
from swarm_worker.device import pick_device


def test_auto_takes_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, wanted in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert pick_device("auto").type == wanted


def test_a_gpu_that_is_not_there_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="sees no GPU here: set it to auto or cpu"):
        pick_device("cuda")
