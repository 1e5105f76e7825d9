"""Bases of the anchor's replay: what plain linear algebra finds, due when sketches would be, and kept like any version."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from anchor_node import replay_bases
from anchor_node.calibrator import BasisKeeper, condition, directions
from anchor_node.replay_bases import ReplayBases
from anchor_node.steering import Steering
from codec.basis import Basis
from codec.fit import FitName, fit_pair, metric_weights, moment, moment_weights, overlap, refine
from codec.spec import Direction, LinkSpec
from swarm_core.wire.bases import Key, as_whole, basis_of, matrix_of
from swarm_core.wire.messages import BasisSet

WIDTH, RANKS = 12, (5, 4)
F, B = Direction.FORWARD, Direction.BACKWARD
SPEC = LinkSpec("lowrank", WIDTH, *RANKS)
ALL: list[Key] = [(boundary, direction) for boundary in (0, 1) for direction in (F, B)]


def start(spec: LinkSpec = SPEC, **options: object) -> BasisKeeper:
    keys = [key for key in ALL if key[1] in directions(spec)]
    matrices = [matrix_of(key, torch.eye(WIDTH)[:, : RANKS[key[1]]], step=0.5) for key in keys]
    return BasisKeeper(spec, 2, BasisSet(0, 0, matrices), **options)  # type: ignore[arg-type]


def rows(seed: int, count: int = 300) -> tuple[Tensor, Tensor]:
    """(h, dL/dh) with energy that falls off differently, gradients tiny as they are."""
    generator = torch.Generator().manual_seed(seed)
    frames = [torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0] for _ in range(2)]
    decays = [rate ** torch.arange(WIDTH) for rate in (0.7, 0.8)]
    h, g = (torch.randn(count, WIDTH, generator=generator) * d @ q for d, q in zip(decays, frames, strict=True))
    return h, 1e-5 * g


def shown(replay: ReplayBases, boundaries: tuple[int, ...] = (0, 1), parts: int = 3) -> None:
    for boundary in boundaries:
        for h, g in zip(*(x.chunk(parts) for x in rows(boundary)), strict=True):
            replay.watch(boundary, h, g)


@pytest.mark.parametrize("fit", ["plain", "weighted", "metric"])
def test_the_pairs_are_exact_in_eigenvalue_order_and_become_the_next_version(fit: FitName) -> None:
    keeper = start(fit=fit)
    before = keeper.current
    replay = ReplayBases(keeper, 20, fit, 0.05, outliers=3.0)
    shown(replay)
    fits = replay.solve(19)
    made = keeper.adopt(19, fits)
    assert made is keeper.current and (made.version, made.tick) == (1, 19)
    for key in ALL:
        h, g = rows(key[0])
        parts = zip(h.chunk(3), g.chunk(3), strict=True)  # the median that outliers are judged by is a microbatch's
        moments, metrics = [], []
        for h_NH, g_NH in parts:
            x_NH = h_NH if key[1] is F else g_NH
            moments.append(moment(x_NH, moment_weights(x_NH, key[1], fit, 3.0)))
            metrics.append(moment(g_NH, metric_weights(h_NH, g_NH, 3.0)))
        metric_HH = sum(metrics) if fit == "metric" and key[1] is F else None
        wanted = fit_pair(sum(moments), metric_HH, RANKS[key[1]], 0.05)
        torch.testing.assert_close(fits[key].encoder_HR, wanted.encoder_HR, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fits[key].decoder_RH, wanted.decoder_RH, rtol=1e-4, atol=1e-5)
        assert torch.equal(fits[key].eigenvalues_R, fits[key].eigenvalues_R.sort(descending=True).values)
        basis = keeper.bases[key]
        assert (basis.version, basis.rank, basis.step) == (1, RANKS[key[1]], 0.5)
        assert float(overlap(basis.encoder_HR, wanted.encoder_HR)) > 0.9999
    assert keeper.changes is not None and as_whole(keeper.changes, before, SPEC) == made
    assert keeper.held(0) is not None and keeper.held(1) == keeper.bases and keeper.held(7) is None


def test_one_is_due_at_the_first_replay_of_each_window() -> None:
    keeper = start()
    replay = ReplayBases(keeper, 20)
    due = []
    for tick in (0, 12, 25, 26, 38, 39, 80, 99, 100):
        shown(replay, parts=1)
        if fits := replay.solve(tick):
            due.append(tick)
            keeper.adopt(tick, fits)
    assert due == [25, 39, 80, 99]
    assert keeper.version == 4


def unit(moment_HH: Tensor) -> Tensor:
    return moment_HH / moment_HH.trace()


def test_a_window_holds_all_of_its_replays_and_the_one_before_fades() -> None:
    keeper = start()
    replay = ReplayBases(keeper, 10)
    h, g = rows(0)
    for tick, part in ((3, slice(0, 100)), (9, slice(100, 300))):
        replay.watch(0, h[part], g[part])
        fits = replay.solve(tick)
    wanted = fit_pair(moment(h), None, RANKS[F])
    torch.testing.assert_close(fits[(0, F)].eigenvalues_R, wanted.eigenvalues_R)
    keeper.adopt(9, fits)
    later_h, later_g = rows(5, count=100)
    replay.watch(0, 1000 * later_h, 0.001 * later_g)  # a row counts as a row, whatever the gradients have become
    fits = replay.solve(19)
    for direction, first, second in ((F, h, later_h), (B, g, later_g)):
        both_HH = 0.8 * 300 * unit(moment(first)) + 100 * unit(moment(second))
        wanted = fit_pair(both_HH, None, RANKS[direction])
        torch.testing.assert_close(fits[(0, direction)].eigenvalues_R, wanted.eigenvalues_R, rtol=1e-5, atol=1e-7)


def test_what_has_seen_too_few_rows_waits_for_more() -> None:
    keeper = start()
    replay = ReplayBases(keeper, 1)
    h, g = rows(0, count=16 * WIDTH)
    replay.watch(0, h[:-1], g[:-1])
    replay.watch(1, h[:90], g[:90])
    assert replay.solve(5) == {}
    replay.watch(0, h[-1:], g[-1:])
    fits = replay.solve(6)
    assert set(fits) == {(0, F), (0, B)}, "the other boundary keeps its basis and what it has seen"
    torch.testing.assert_close(fits[(0, F)].eigenvalues_R, fit_pair(moment(h), None, RANKS[F]).eigenvalues_R)
    keeper.adopt(6, fits)
    assert replay.solve(7) == {}, "nothing new has been seen"
    replay.watch(1, h, g)
    assert set(replay.solve(8)) >= {(1, F), (1, B)}


def test_a_boundary_that_shows_nothing_sound_keeps_its_basis_and_nothing_at_all_makes_no_version() -> None:
    keeper = start()
    old = dict(keeper.bases)
    replay = ReplayBases(keeper, 1)
    assert replay.solve(1) == {} and keeper.adopt(1, {}) is None and keeper.version == 0
    h, g = rows(1)
    for bad in (math.nan, math.inf):
        replay.watch(1, h, g * bad)
        replay.watch(1, h * bad, g)
    replay.watch(1, h[:0], g[:0])
    shown(replay, boundaries=(0,))
    made = keeper.adopt(1, replay.solve(1))
    assert made is not None and keeper.version == 1
    for key in ALL:
        same = torch.equal(keeper.bases[key].encoder_HR, old[key].encoder_HR)
        assert same == (key[0] == 1), key


def test_ranks_and_steps_stay_whatever_steering_would_want() -> None:
    keeper = start(steering={d: Steering(1.0, 0.5, RANKS[d]) for d in (F, B)})
    replay = ReplayBases(keeper, 1)
    shown(replay)
    keeper.adopt(1, replay.solve(1))
    assert {key: (b.rank, b.step) for key, b in keeper.bases.items()} == {key: (RANKS[key[1]], 0.5) for key in ALL}
    assert keeper.decisions == {}


def test_exact_links_have_one_basis_of_activations() -> None:
    keeper = start(LinkSpec("lowrank", WIDTH, RANKS[0], backward="exact"), fit="metric")
    replay = ReplayBases(keeper, 1, "metric")
    shown(replay)
    assert set(replay.solve(1)) == {(0, F), (1, F)}


@pytest.mark.parametrize("fit", ["weighted", "metric"])
def test_a_wide_model_takes_the_warm_step_of_a_stage_s_sketch(fit: FitName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_bases, "WIDEST", WIDTH - 1)
    keeper = start(fit=fit)
    h, g = rows(0)
    c_HH = moment(h, moment_weights(h, F, fit))
    g_HH = moment(g, metric_weights(h, g))
    best = fit_pair(c_HH, g_HH if fit == "metric" else None, RANKS[F])
    for tick in range(1, 12):
        replay = ReplayBases(keeper, 1, fit)
        old = keeper.bases[(0, F)]
        shown(replay)
        fits = replay.solve(tick)
        v_HR, u_HR = c_HH @ old.encoder_HR.double(), g_HH @ old.decoder_RH.T.double()
        metric = (u_HR, float(g_HH.trace())) if fit == "metric" else ()
        wanted = refine(old, v_HR, float(c_HH.trace()), *metric)
        product = wanted.encoder_HR @ wanted.decoder_RH
        assert (fits[(0, F)].encoder_HR @ fits[(0, F)].decoder_RH - product).norm() < 1e-3 * product.norm()
        keeper.adopt(tick, fits)
    pair, wanted_HH = keeper.bases[(0, F)], best.encoder_HR @ best.decoder_RH
    assert (pair.encoder_HR @ pair.decoder_RH - wanted_HH).norm() < 0.05 * wanted_HH.norm()


# What is said of a version ------------------------------------------------------------------------------------------


def test_a_version_s_numbers_tell_a_sound_basis_from_a_broken_one() -> None:
    keeper = start()
    replay = ReplayBases(keeper, 1)
    shown(replay)
    keeper.adopt(1, replay.solve(1))
    numbers = keeper.numbers()
    for boundary, direction in ALL:
        place = f"{direction.name.lower()}/boundary_{boundary}"
        values = {
            name.removeprefix("basis/").removesuffix(f"_{place}"): v for name, v in numbers.items() if place in name
        }
        assert set(values) == {"overlap", "fit", "weakest", "rank", "step", "condition", "identity_error"}
        assert values["condition"] == pytest.approx(1.0, abs=0.02)  # orthonormal, in bf16
        assert 0 <= values["identity_error"] < 1e-6 and 0.5 < values["fit"] <= 1.0
        assert 0 < values["weakest"] < 1 and 0 < values["overlap"] < 1
    for apart in (0.1, 0.01, 0.001):  # two columns that are nearly one
        dependent = torch.eye(WIDTH)[:, :3].clone()
        dependent[:, 1] = dependent[:, 0] + apart * dependent[:, 1]
        basis = basis_of(matrix_of((0, F), dependent), 0, SPEC)
        assert condition(basis) == pytest.approx(2.0 / apart, rel=0.6)
        assert condition(basis.prefix(1)) < condition(basis)
    oblique = Basis.from_wire(0, torch.eye(WIDTH)[:, :1] * 4.0, torch.ones(1, WIDTH))
    assert condition(oblique) == pytest.approx(WIDTH**0.5)  # whatever the scale of either
