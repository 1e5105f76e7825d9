"""Sketches: sums of what crossed, cheap, of one basis version, and the same again after a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from codec.basis import Basis
from codec.fit import metric_weights, moment, orthonormalise, rms_weights
from codec.spec import Direction
from swarm_worker.sketching import METRIC, MOMENT, Sketcher

F, B = Direction.FORWARD, Direction.BACKWARD
KEY = (1, F)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oblique(version: int = 0, seed: int = 0) -> Basis:
    return Basis.from_wire(version, seeded(8, 3, seed=seed), seeded(3, 8, seed=seed + 1))


def close(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), wanted, rtol=2.0**-8, atol=1e-4)


def test_both_sides_sum_up_what_the_fit_asks_for() -> None:
    basis, sketcher = oblique(), Sketcher("metric", outliers=16.0)
    h_NH, g_NH = seeded(40, 8, seed=3), seeded(40, 8, seed=4) * 1e-6
    h_NH[5] *= 1000  # an outlier
    for rows in (slice(0, 25), slice(25, 40)):
        sketcher.watch_sent(KEY, basis, h_NH[rows], 100, 1000)
        sketcher.watch_received(KEY, basis, h_NH[rows], g_NH[rows])
        sketcher.watch_sent((1, B), basis, g_NH[rows], 100, 2000)
    forward, metric, backward = sketcher.take()
    assert [(s.boundary, s.direction, s.part) for s in (forward, metric, backward)] == [
        (1, F, MOMENT), (1, F, METRIC), (1, B, MOMENT)
    ]  # fmt: skip
    assert (forward.rows_seen, forward.packet_bytes, backward.packet_bytes) == (200, 2000, 4000)
    kept = torch.arange(40) != 5
    c_HH = moment(h_NH[kept], rms_weights(h_NH[kept]))
    close(forward.v_HR, c_HH @ basis.encoder_HR.double())
    assert abs(forward.trace - 39 * 8) < 1e-3  # rows of rms 1
    g_HH = moment(g_NH[kept], metric_weights(h_NH[kept], g_NH[kept]))
    torch.testing.assert_close(
        metric.v_HR.double(), g_HH @ basis.decoder_RH.T.double(), rtol=2.0**-8, atol=1e-6 * float(g_HH.trace())
    )
    assert abs(metric.trace / float(g_HH.trace()) - 1) < 1e-5
    b_HH = moment(g_NH, rms_weights(g_NH).sqrt())
    assert abs(backward.trace / float(b_HH.trace()) - 1) < 1e-5
    assert sketcher.take() == []


def test_only_the_metric_fit_looks_at_gradients_that_arrive() -> None:
    basis, x_NH = oblique(), seeded(10, 8) * 2
    for fit, parts in (("plain", [MOMENT]), ("weighted", [MOMENT]), ("metric", [MOMENT, METRIC])):
        sketcher = Sketcher(fit)
        sketcher.watch_sent(KEY, basis, x_NH, 10, 1)
        sketcher.watch_received(KEY, basis, x_NH, x_NH)
        made = sketcher.take()
        assert [s.part for s in made] == parts
        wanted = float(x_NH.square().sum()) if fit == "plain" else 80.0  # ten rows of rms 1
        assert abs(made[0].trace - wanted) < 1e-3


def test_the_plain_fit_is_the_plain_moment() -> None:
    basis, x_NH, sketcher = Basis.orthonormal(0, orthonormalise(seeded(8, 3))), seeded(10, 8, seed=1), Sketcher()
    sketcher.watch_sent(KEY, basis, x_NH, 10, 1)
    (made,) = sketcher.take()
    close(made.v_HR, moment(x_NH) @ basis.encoder_HR.double())


def test_a_new_version_begins_a_new_window() -> None:
    sketcher, x_NH = Sketcher(), seeded(10, 8)
    sketcher.watch_sent(KEY, oblique(0), x_NH * 5, 10, 1)
    sketcher.watch_sent(KEY, oblique(1, seed=7), x_NH, 10, 1)
    (made,) = sketcher.take()
    assert (made.version, made.rows_seen) == (1, 10)
    close(made.v_HR, moment(x_NH) @ oblique(1, seed=7).encoder_HR.double())


def test_a_poisoned_packet_leaves_the_window_as_it_was_and_an_empty_one_is_not_sent() -> None:
    sketcher, x_NH, basis = Sketcher("metric"), seeded(10, 8), oblique()
    sketcher.watch_sent((0, F), basis, x_NH, 10, 1)
    for bad in (float("nan"), float("inf")):
        sketcher.watch_sent((0, F), basis, x_NH * bad, 10, 1)
        sketcher.watch_received((0, F), basis, x_NH, x_NH * bad)
    sketcher.watch_sent((0, B), basis, x_NH * 0.0, 10, 1)
    (made,) = sketcher.take()
    assert (made.boundary, made.direction, made.part) == (0, F, MOMENT)
    close(made.v_HR, moment(x_NH, rms_weights(x_NH)) @ basis.encoder_HR.double())


def test_a_window_goes_on_after_a_checkpoint_bit_for_bit() -> None:
    basis, parts = oblique(), [seeded(10, 8, seed=seed) for seed in range(4)]
    straight, broken = Sketcher("metric"), Sketcher("metric")
    for i, x_NH in enumerate(parts):
        if i == 2:
            tensors, metadata = broken.state()
            assert all(t.ndim for t in tensors.values()) and len(metadata) == 2
            broken = Sketcher("metric")
            broken.load({name: t.clone() for name, t in tensors.items()}, metadata)
        for sketcher in (straight, broken):
            sketcher.watch_sent(KEY, basis, x_NH, 10, 50 + i)
            sketcher.watch_received(KEY, basis, x_NH, x_NH * 0.1)
    for one, two in zip(straight.take(), broken.take(), strict=True):
        assert torch.equal(one.v_HR, two.v_HR)
        assert (one.trace, one.rows_seen, one.packet_bytes) == (two.trace, two.rows_seen, two.packet_bytes)


def test_no_graph_is_kept() -> None:
    sketcher, x_NH = Sketcher("metric"), seeded(10, 8).requires_grad_()
    sketcher.watch_sent(KEY, oblique(), x_NH * 2, 10, 1)
    sketcher.watch_received(KEY, oblique(), x_NH * 2, x_NH * 3)
    assert not any(tensor.requires_grad for tensor in sketcher.state()[0].values())
