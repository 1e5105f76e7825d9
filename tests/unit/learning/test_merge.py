"""Mergers against a short reference written from METHOD section 2, and their promises for the life of a correction."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swarm_core.learning.merge import (
    HeldCorrection,
    MergeError,
    Merger,
    MergeSpec,
    MergeSums,
    measures,
    smooth,
)

SHAPES = [(7,), (33, 40), (), (64, 4), (3, 129), (0, 5)]
SNAPSHOT, BIRTH = 10, 13


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reference(
    spec: MergeSpec, G: list[Tensor], M: list[Tensor], t: int, s: int, born: int, ceilings: list[float]
) -> tuple[list[Tensor], list[float]]:
    """METHOD section 2: (merged gradients, lambdas). M is delta for held_delta; ceilings: the life's lambdas so far."""
    if spec.merger == "none" or t - s > spec.k_max or not all(bool(g.isfinite().all()) for g in G):
        return G, ceilings
    G, M = [g.double() for g in G], [m.double() for m in M]
    if spec.merger == "signed_ema":
        return [spec.alpha * g + (1 - spec.alpha) * g.abs() * m.sign() for g, m in zip(G, M)], ceilings
    age = t - s if spec.age_from == "snapshot" else t - born
    merged, lambdas = [], []
    for g, delta, ceiling in zip(G, M, ceilings):
        lambda_ = spec.lambda_cap
        if spec.adaptive_lambda == "ratio" and delta.norm() > 0:
            c = float(delta.norm() / g.norm())
            lambda_ = 0.0 if c > spec.c_max else spec.lambda_cap * min(1.0, 1 / c)
        lambda_ = min(lambda_, ceiling)
        lambdas.append(lambda_)
        merged.append(g + lambda_ * spec.age_decay**age * delta)
    return merged, lambdas


def tensors(seed: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> list[Tensor]:
    """Random tensors of SHAPES, their sizes 10^-2..10^1 apart from each other, with some exact zeros."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for shape in SHAPES:
        size = scale * 10 ** float(torch.rand((), generator=g) * 3 - 2)
        values = torch.randn(shape, generator=g, dtype=torch.float64) * size
        made.append(torch.where(torch.rand(shape, generator=g) < 0.1, 0.0, values).to(dtype))
    return made


def correction(seed: int, version: int = 1, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> HeldCorrection:
    return HeldCorrection(version, SNAPSHOT, BIRTH, tuple(tensors(seed, dtype, scale)))


def clone(held: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in held]


def bits(held: list[Tensor]) -> list[bytes]:
    return [t.numpy().tobytes() for t in held]


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative distance over the tensors."""
    pairs = [(f.double(), w.double()) for f, w in zip(found, wanted, strict=True) if w.numel()]
    return max(float((f - w).norm() / (w.norm() + 1e-300)) for f, w in pairs)


SPECS = [
    MergeSpec(
        "held_delta", age_from=age_from, adaptive_lambda=ratio, age_decay=mu, lambda_cap=cap, c_max=c_max, k_max=k
    )
    for age_from, ratio, (mu, cap), (c_max, k) in itertools.product(
        ["snapshot", "birth"],
        ["ratio", "none"],
        [(0.88, 0.5), (0.5, 2.0), (1.0, 0.3), (0.0, 0.5)],
        [(4.0, 6), (0.7, 6), (math.inf, 0)],
    )
] + [MergeSpec("signed_ema", alpha=a, k_max=k) for a, k in [(0.25, 6), (0.0, 6), (1.0, 6), (0.6, 0)]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_age_is_as_the_reference(spec: MergeSpec, dtype: torch.dtype) -> None:
    held, merger, ceilings = correction(1, dtype=dtype), Merger(spec, len(SHAPES)), [math.inf] * len(SHAPES)
    for age in range(spec.k_max + 4):
        tick = SNAPSHOT + age
        before = tensors(100 + age, dtype)
        found, born = clone(before), min(BIRTH, tick)  # a birth after the tick counts as age 0
        sums = merger.merge(found, held, tick)
        wanted, ceilings = reference(spec, before, list(held.tensors), tick, SNAPSHOT, born, ceilings)
        assert distance(found, wanted) < 1e-7
        assert (sums is None) == (age > spec.k_max)
        if sums is None:
            assert bits(found) == bits(before)
        if age == 0 and spec.alpha < 1:
            assert distance(found, before) > 0.01
        merger.settle(keep=True)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    ratio=st.sampled_from(["ratio", "none"]),
    age_from=st.sampled_from(["snapshot", "birth"]),
    mu=st.floats(0, 1),
    cap=st.floats(0.01, 2),
    c_max=st.floats(0.05, 20),
    ticks=st.lists(st.tuples(st.integers(0, 3), st.floats(-3, 3), st.sampled_from("ckr")), min_size=2, max_size=12),
)
def test_the_weight_never_rises_over_a_life(
    seed: int, ratio: Any, age_from: Any, mu: float, cap: float, c_max: float, ticks: list[tuple[int, float, str]]
) -> None:
    """Gradients of any size, in committed (c), skipped (k) and retried (r) ticks: what is added falls or stays."""
    spec = MergeSpec("held_delta", 0.25, mu, age_from, ratio, cap, c_max, k_max=40)
    merger, held, tick = Merger(spec, len(SHAPES)), correction(seed), SNAPSHOT
    last = [math.inf] * len(SHAPES)
    for step, (gap, scale, outcome) in enumerate(ticks):
        tick += gap
        before = tensors(seed + 1 + step, scale=10**scale)
        found = clone(before)
        merger.merge(found, held, tick)
        # The weight that a tensor got, from what was added along delta.
        weights = [
            float(((f - b) * d).sum() / (d * d).sum()) if d.numel() and d.any() else 0.0
            for f, b, d in zip(found, before, held.tensors, strict=True)
        ]
        slack = [1e-9 * (1 + 10**scale)] * len(SHAPES)  # of the subtraction
        assert all(-s <= w <= max(old, 0) + s for w, old, s in zip(weights, last, slack, strict=True))
        if outcome != "r":  # a retried tick is merged again before anything is decided
            merger.settle(keep=outcome == "c")
        if outcome == "c":
            last = weights


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    merger=st.sampled_from(["signed_ema", "held_delta"]),
    k=st.integers(0, 30),
    over=st.integers(1, 99),
)
def test_older_than_k_max_changes_no_bit(seed: int, merger: Any, k: int, over: int) -> None:
    before = tensors(seed, torch.float32)
    before[0][0] = -0.0
    for age_from in ("snapshot", "birth"):
        held, found = correction(seed + 1, dtype=torch.float32), clone(before)
        stage = Merger(MergeSpec(merger, age_from=age_from, k_max=k), len(SHAPES))  # type: ignore[arg-type]
        assert stage.merge(found, held, SNAPSHOT + k + over) is None
        assert bits(found) == bits(before)
        assert stage.merge(found, held, SNAPSHOT + k) is not None


@pytest.mark.parametrize("merger", ["none", "signed_ema", "held_delta"])
def test_nothing_to_merge_changes_no_bit(merger: Any) -> None:
    stage, before = Merger(MergeSpec(merger), len(SHAPES)), tensors(3, torch.float32)
    found = clone(before)
    assert stage.merge(found, None, 12) is None and bits(found) == bits(before)
    for poison in (math.nan, math.inf, -math.inf):
        for at in (0, 3):
            broken = clone(before)
            broken[at].view(-1)[5] = poison
            found = clone(broken)
            assert stage.merge(found, correction(4, dtype=torch.float32), 12) is None and bits(found) == bits(broken)
            stage.settle(keep=True)
    bad = correction(4, dtype=torch.float32)
    bad.tensors[1][2, 2] = math.nan
    found = clone(before)
    assert stage.merge(found, bad, 12) is None and bits(found) == bits(before)
    stage.settle(keep=True)
    assert stage.state()["version"] == 0


@pytest.mark.parametrize(
    "spec",
    [
        MergeSpec("held_delta", c_max=1e-9),
        MergeSpec("held_delta", lambda_cap=0.0),
        MergeSpec("held_delta", lambda_cap=0.0, adaptive_lambda="none"),
        MergeSpec("held_delta", age_decay=0.0),
    ],
    ids=str,
)
def test_a_lambda_of_0_changes_no_bit_and_is_told(spec: MergeSpec) -> None:
    before = tensors(5, torch.float32)
    before[1][0, :20] = -0.0  # adding 0 delta would turn it into 0
    found = clone(before)
    sums = Merger(spec, len(SHAPES)).merge(found, correction(6, dtype=torch.float32), SNAPSHOT + 2)
    assert bits(found) == bits(before)
    assert sums is not None and sums.dose_sq == 0 and sums.merged_sq == sums.gradient_sq
    assert measures(sums)["correction/share"] == 0 and measures(sums)["correction/c"] > 0


def test_zeros_on_either_side() -> None:
    """Without a gradient c is infinite and nothing is added; without a delta there is nothing to add or to remember."""
    merger, g, zero = Merger(MergeSpec("held_delta", c_max=math.inf), 2), torch.tensor([-0.0, 3.0]), torch.zeros(2)
    found = [g.clone(), zero.clone()]
    merger.merge(found, HeldCorrection(1, 0, 0, (zero, g)), 0)
    assert bits(found) == bits([g, zero])
    merger.settle(keep=True)
    assert merger.state()["lambdas"] == [0.5, 0.0]
    merger.merge([g.clone()] * 2, HeldCorrection(1, 0, 0, (zero, g)), 1)
    merger.settle(keep=True)
    assert merger.state()["lambdas"] == [0.5, 0.0]  # a lambda of 0 is the end of this life
    merger.merge([g.clone()] * 2, HeldCorrection(2, 1, 1, (zero, g)), 2)
    merger.settle(keep=True)
    assert merger.state() == {"version": 2, "tick": 2, "lambdas": [0.5, 0.5]}


def test_only_a_committed_tick_moves_the_memory() -> None:
    spec, held = MergeSpec("held_delta", age_decay=1.0), correction(7)
    small, large = [t * 0.5 for t in held.tensors], [t * 10 for t in held.tensors]  # lambdas 0.25 and 0.5
    merger = Merger(spec, len(SHAPES))
    for outcome in (False, False):
        merger.merge(clone(small), held, SNAPSHOT)
        merger.settle(keep=outcome)
        assert merger.state()["version"] == 0
    merger.merge(clone(small), held, SNAPSHOT)  # retried: its gradient is another
    merger.merge(clone(large), held, SNAPSHOT)
    merger.settle(keep=True)
    assert [n for n in merger.state()["lambdas"]] == pytest.approx([0.5] * len(SHAPES))
    merger.settle(keep=True)  # a tick without a merge
    merger.merge(clone(small), held, SNAPSHOT + 1)
    merger.merge([], None, SNAPSHOT + 1)  # and its retry has no correction
    merger.settle(keep=True)
    assert merger.state()["tick"] == SNAPSHOT


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), cut=st.integers(0, 6), merger=st.sampled_from(["signed_ema", "held_delta"]))
def test_a_state_taken_mid_life_goes_on_with_the_same_bits(seed: int, cut: int, merger: Any) -> None:
    spec, held = MergeSpec(merger, k_max=10), [correction(seed, 1), correction(seed + 1, 2)]

    def run(restart: int | None) -> list[bytes]:
        stage, out = Merger(spec, len(SHAPES)), []
        for step in range(8):
            if step == restart:
                state = json.loads(json.dumps(stage.state()))
                stage = Merger(spec, len(SHAPES))
                stage.load(state)
                assert stage.state() == state
            gradients = tensors(seed + 10 + step, torch.float32, scale=10 ** (step % 3 - 1))
            stage.merge(gradients, held[step // 4], SNAPSHOT + step)
            stage.settle(keep=step % 3 != 1)
            out += bits(gradients)
        return out

    assert run(cut) == run(None)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6), cut=st.integers(0, len(SHAPES)), merger=st.sampled_from(["signed_ema", "held_delta"])
)
def test_stages_add_up_to_the_whole(seed: int, cut: int, merger: Any) -> None:
    spec, held, before = MergeSpec(merger), correction(seed), tensors(seed + 1)
    whole = clone(before)
    sums = Merger(spec, len(SHAPES)).merge(whole, held, SNAPSHOT + 3)
    parts, total = clone(before), MergeSums()
    for span in (slice(0, cut), slice(cut, None)):
        held_part = HeldCorrection(1, SNAPSHOT, BIRTH, held.tensors[span])
        part = Merger(spec, len(parts[span])).merge(parts[span], held_part, SNAPSHOT + 3)
        assert part is not None
        total += part
    assert bits(parts) == bits(whole)
    assert sums is not None and measures(total) == pytest.approx(measures(sums), rel=1e-12)


@pytest.mark.parametrize("spec", [MergeSpec("held_delta"), MergeSpec("signed_ema")], ids=str)
def test_measures_by_hand(spec: MergeSpec) -> None:
    held, before = correction(8, scale=0.7), tensors(9)
    found = clone(before)
    sums = Merger(spec, len(SHAPES)).merge(found, held, SNAPSHOT + 3)
    assert sums is not None

    def flat(parts: Any) -> Tensor:
        return torch.cat([p.reshape(-1) for p in parts])

    G, merged = flat(before), flat(found)
    C = flat(held.tensors) if spec.merger == "held_delta" else flat(held.tensors).sign()
    wanted = {
        "correction/share": float((merged - G).norm() / merged.norm()),
        "correction/cos": float(torch.dot(C, G) / (C.norm() * G.norm())),
    }
    if spec.merger == "held_delta":
        dose = (merged - G) / spec.age_decay**3
        wanted |= {
            "correction/c": float(C.norm() / G.norm()),
            "correction/lambda": float(dose.norm() / C.norm()),
        }
    assert measures(sums) == pytest.approx(wanted, rel=1e-9)
    assert measures(MergeSums()) == {}


def test_signs_may_travel_in_any_dtype() -> None:
    spec, before, mean = MergeSpec("signed_ema"), tensors(11, torch.float32), tensors(12, torch.float32)
    out = []
    for held in (mean, [m.sign() for m in mean], [m.sign().to(torch.int8) for m in mean]):
        found = clone(before)
        kept = clone(held)
        Merger(spec, len(SHAPES)).merge(found, HeldCorrection(1, 0, 0, tuple(held)), 0)
        out.append(bits(found))
        assert bits(held) == bits(kept)  # a correction is merged many times
    assert out[0] == out[1] == out[2]


def test_long_tensors_keep_their_norms() -> None:
    """torch's own fp32 norm of 3 million entries is off by 1e-4; lambda must not be, nor differ over devices."""
    g = torch.Generator().manual_seed(13)
    gradient = torch.randn(3_000_001, generator=g)
    delta = torch.randn(3_000_001, generator=g) * 2
    sums = Merger(MergeSpec("held_delta"), 1).merge([gradient.clone()], HeldCorrection(1, 0, 0, (delta,)), 0)
    G, D = gradient.double(), delta.double()
    assert sums is not None
    assert sums.gradient_sq == pytest.approx(float(G.square().sum()), rel=1e-8)
    assert sums.delta_sq == pytest.approx(float(D.square().sum()), rel=1e-8)
    assert sums.dot == pytest.approx(float(G.dot(D)), abs=1e-8 * float(G.norm() * D.norm()))


def test_smooth_starts_at_the_first_mean() -> None:
    series = [tensors(seed) for seed in range(20, 24)]
    mean, wanted = None, clone(series[0])
    for step, new in enumerate(series):
        kept = clone(new)
        mean = smooth(mean, new, 0.5)
        if step:
            wanted = [0.5 * w + 0.5 * n for w, n in zip(wanted, new, strict=True)]
        assert distance(mean, wanted) < 1e-12 and bits(new) == bits(kept)
    assert bits(smooth(series[0], series[1], 0.0)) == bits(series[1])
    assert distance(smooth(series[0], series[1], 0.9), [0.9 * a + 0.1 * b for a, b in zip(*series[:2])]) < 1e-12
    with pytest.raises(MergeError, match="beta_anc: got 1.0"):
        smooth(None, series[0], 1.0)
    with pytest.raises(MergeError, match="mean: got 2 tensors"):
        smooth(series[0][:2], series[1], 0.5)


@pytest.mark.parametrize(
    ("tick", "version", "said"),
    [
        (SNAPSHOT - 1, 3, "age -1, wanted >= 0; a rollback must drop"),
        (SNAPSHOT + 4, 3, "version 3 in tick 14, wanted nothing before version 3 in tick 15"),
        (SNAPSHOT + 6, 2, "version 2 in tick 16, wanted nothing before version 3 in tick 15"),
    ],
)
def test_what_goes_back_in_time_is_refused(tick: int, version: int, said: str) -> None:
    merger = Merger(MergeSpec("held_delta"), len(SHAPES))
    merger.merge(tensors(1), correction(2, 3), SNAPSHOT + 5)
    merger.settle(keep=True)
    before = tensors(1)
    found = clone(before)
    with pytest.raises(MergeError, match=said):
        merger.merge(found, correction(2, version), tick)
    assert bits(found) == bits(before)


def test_other_tensors_are_refused() -> None:
    held = correction(1)
    for gradients, said in (
        (tensors(2)[:3], "6 tensors for 3 gradients"),
        ([t.reshape(-1) for t in tensors(2)], r"tensor 1: got torch.float64 \[33, 40\] for a gradient"),
        ([t.bfloat16() for t in tensors(2)], "tensor 0: got .* gradient torch.bfloat16"),
    ):
        for merger in ("signed_ema", "held_delta"):
            with pytest.raises(MergeError, match=said):
                Merger(MergeSpec(merger), len(SHAPES)).merge(gradients, held, SNAPSHOT)  # type: ignore[arg-type]
    with pytest.raises(MergeError, match="correction version: got 0"):
        HeldCorrection(0, 1, 1, ())


@pytest.mark.parametrize(
    "wrong",
    [
        {"merger": "ema"},
        {"alpha": 1.1},
        {"age_decay": 1.01},
        {"age_from": "now"},
        {"adaptive_lambda": "yes"},
        {"lambda_cap": -0.1},
        {"lambda_cap": math.nan},
        {"c_max": 0.0},
        {"k_max": -1},
    ],
)
def test_impossible_specs_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MergeError, match=f"{next(iter(wrong))}: got .*corrections"):
        MergeSpec(**wrong)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"version": 1, "tick": 3, "lambdas": [0.5]},
        {"version": 0, "tick": 0, "lambdas": [0.5, 0.5]},
        {"version": 1, "tick": -3, "lambdas": [0.5, 0.5]},
        {"version": 1.0, "tick": 3, "lambdas": [0.5, 0.5]},
        {"version": 1, "tick": 3, "lambdas": [0.5, math.nan]},
        {"version": 1, "tick": 3, "lambdas": [0.5, -0.5]},
        {"version": 1, "tick": 3, "lambdas": "05"},
    ],
)
def test_a_damaged_state_is_refused_and_nothing_changes(state: dict[str, Any]) -> None:
    merger = Merger(MergeSpec("held_delta"), 2)
    merger.load({"version": 4, "tick": 9, "lambdas": [0.5, 0.125]})
    with pytest.raises(MergeError, match="merger state"):
        merger.load(state)
    assert merger.state() == {"version": 4, "tick": 9, "lambdas": [0.5, 0.125]}
