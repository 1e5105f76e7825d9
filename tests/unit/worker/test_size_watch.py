"""The size of what arrives: what is believed, what is a fault, and that a fault does not move what is usual."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swarm_worker.size_watch import MOST_RATIO, SizeWatch


def rows(scale: float, count: int = 40) -> Tensor:
    return scale * torch.randn(count, 16, generator=torch.Generator().manual_seed(0))


def watched(*scales: float) -> SizeWatch:
    watch = SizeWatch()
    for scale in scales:
        watch.saw(rows(scale))
        assert watch.fault() == ""
    return watch


@pytest.mark.parametrize("scale", [1000.0, 1.1 * MOST_RATIO, float("inf")])
def test_a_packet_far_beyond_the_usual_is_a_fault_however_often_it_comes(scale: float) -> None:
    watch = watched(1.0)
    for _ in range(100):
        watch.saw(rows(1.0))
        watch.saw(rows(scale))
        assert "is usual, at most 64 times that" in watch.fault()
    watch.saw(rows(1.0))
    assert watch.fault() == ""


def test_outliers_and_slow_drift_are_honest() -> None:
    watch, massive = watched(1.0), rows(1.0)
    massive[:25] *= 1e4
    for i in range(200):
        watch.saw(massive * 1.05**i)
        assert watch.fault() == ""


def test_what_is_small_is_honest_and_zeros_say_nothing() -> None:
    watch = watched(1.0, 1e-6, 1.0)
    watch.saw(torch.zeros(8, 16))
    watch.saw(torch.zeros(0, 16))
    assert watch.fault() == "" and watch.fault() == ""
    watch.saw(rows(20.0))
    assert watch.fault() == ""


def test_the_first_packets_are_held_against_each_other() -> None:
    watch = SizeWatch()
    watch.saw(rows(1.0))
    watch.saw(rows(1000.0))
    assert watch.fault()
