"""Clipping, AdamW, its state and the learning rate: the same bits whatever the split."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from swarm_core.learning.optimizer import (
    OptimizerError,
    OptimizerSpec,
    apply,
    build_optimizer,
    clip_coefficient,
    export_state,
    fill_missing_gradients,
    gradient_norms,
    import_state,
    learning_rate,
    total_norm,
)

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parameters(seed: int, count: int, dtype: torch.dtype, scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        shape = [(7,), (33, 5), (64,), (3, 129), (1,)][i % 5]
        parameter = nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
        parameter.grad = scale * 10.0 ** (i % 4 - 2) * torch.randn(shape, generator=generator, dtype=dtype)
        made.append(parameter)
    return made


def clone(held: list[nn.Parameter]) -> list[nn.Parameter]:
    copies = copy.deepcopy(held)
    for mine, theirs in zip(copies, held, strict=True):  # a parameter's copy comes without its gradient
        mine.grad = None if theirs.grad is None else theirs.grad.clone()
    return copies


def bits(tensors: list[Tensor]) -> list[bytes]:
    return [t.detach().numpy().tobytes() for t in tensors]


def grads(held: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in held if p.grad is not None]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 70),
    cuts=st.lists(st.integers(0, 70), max_size=4),
    max_norm=st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 3.0, 1e6]),
    scale=st.sampled_from([1.0, 1e-6]),  # the small ones make torch's 1e-6 in the denominator count
    dtype=st.sampled_from(DTYPES),
)
def test_clipping_has_the_bits_of_torch_for_any_split(
    seed: int, count: int, cuts: list[int], max_norm: float, scale: float, dtype: torch.dtype
) -> None:
    held = parameters(seed, count, dtype, scale)
    torch_held = clone(held)
    torch_total = torch.nn.utils.clip_grad_norm_(torch_held, max_norm)
    edges = [0, *sorted(min(c, count) for c in cuts), count]
    norms = [n for a, b in itertools.pairwise(edges) for n in gradient_norms(held[a:b])]
    assert torch.tensor(total_norm(norms, dtype), dtype=dtype).equal(torch_total)
    coefficient = clip_coefficient(norms, max_norm, dtype)
    for gradient in grads(held):
        gradient.mul_(coefficient)
    assert bits(grads(held)) == bits(grads(torch_held))


def test_norms_survive_a_link_that_carries_their_dtype() -> None:
    norms = gradient_norms(parameters(3, 40, torch.float32))
    sent = torch.tensor(norms, dtype=torch.float32).numpy().tobytes()
    back = torch.frombuffer(bytearray(sent), dtype=torch.float32).tolist()
    assert back == norms


def test_clip_edges() -> None:
    assert clip_coefficient([3.0, 4.0], None) == 1.0
    assert clip_coefficient([], 1.0) == 1.0 and total_norm([]) == 0.0
    assert clip_coefficient([0.0, 0.0], 1.0) == 1.0
    assert total_norm([3.0, 4.0]) == 5.0
    assert math.isnan(total_norm([1.0, math.nan])) and math.isnan(clip_coefficient([1.0, math.nan], 1.0))
    assert clip_coefficient([1.0, math.inf], 1.0) == 0.0 and math.isinf(total_norm([1.0, math.inf]))


def test_a_missing_gradient_is_an_error_until_it_is_filled() -> None:
    held = parameters(0, 3, torch.float32)
    held[1].grad = None
    with pytest.raises(OptimizerError, match=r"parameter 1 \(shape \[33, 5\]\)"):
        gradient_norms(held)
    before = bits([held[0].grad])  # type: ignore[list-item]
    fill_missing_gradients(held)
    assert gradient_norms(held)[1] == 0.0
    assert bits([held[0].grad]) == before  # type: ignore[list-item]


SPEC = OptimizerSpec(learning_rate=3e-3, weight_decay=0.1, warmup_steps=2, schedule="cosine", total_steps=9)


def give_gradients(held: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in held:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [[13], [5, 8], [1, 11, 1]])
def test_stages_step_like_torch_in_one_piece(split: list[int], dtype: torch.dtype) -> None:
    held = parameters(5, 13, dtype)
    whole = clone(held)
    one = torch.optim.AdamW(whole, lr=SPEC.learning_rate, weight_decay=SPEC.weight_decay)
    edges = [sum(split[:i]) for i in range(len(split) + 1)]
    stages = [held[a:b] for a, b in itertools.pairwise(edges)]
    optimizers = [build_optimizer(stage, SPEC) for stage in stages]
    for step in range(6):
        give_gradients(whole, step)
        give_gradients(held, step)
        torch.nn.utils.clip_grad_norm_(whole, 1.0)
        one.param_groups[0]["lr"] = learning_rate(SPEC, step)
        one.step()
        norms = [n for stage in stages for n in gradient_norms(stage)]
        coefficient = clip_coefficient(norms, SPEC.max_grad_norm, dtype)
        assert coefficient < 1.0
        for optimizer in optimizers:
            apply(optimizer, coefficient, learning_rate(SPEC, step))
        assert bits(list(held)) == bits(list(whole))
    assert all(p.grad is None for p in held)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_restored_optimizer_goes_on_with_the_same_bits(dtype: torch.dtype) -> None:
    held = parameters(9, 7, dtype)
    names = [f"p{i}" for i in range(7)]
    optimizer = build_optimizer(held, SPEC)
    for step in range(3):
        give_gradients(held, step)
        apply(optimizer, 0.5, learning_rate(SPEC, step))
    tensors, steps = export_state(optimizer, names)
    frozen = bits(list(tensors.values()))
    assert steps == dict.fromkeys(names, 3) and all(type(n) is int for n in steps.values())
    assert set(tensors) == {f"{m}/{n}" for n in names for m in ("exp_avg", "exp_avg_sq")}
    again = clone(held)
    restored = build_optimizer(again, SPEC)
    import_state(restored, names, tensors, steps)
    for mine, theirs in zip(again, held, strict=True):
        step, kept = restored.state[mine]["step"], optimizer.state[theirs]["step"]
        assert step.dtype == kept.dtype and step.device == kept.device and step.equal(kept)
    assert bits(list(export_state(restored, names)[0].values())) == frozen
    for step in range(3, 8):
        for parts, which in ((held, optimizer), (again, restored)):
            give_gradients(parts, step)
            apply(which, 1.0, learning_rate(SPEC, step))
        assert bits(list(held)) == bits(list(again))
    assert bits(list(tensors.values())) == frozen, "the export is a copy"


def test_a_fresh_optimizer_round_trips_too() -> None:
    held = parameters(9, 2, torch.float32)
    optimizer = build_optimizer(held, SPEC)
    tensors, steps = export_state(optimizer, ["a", "b"])
    assert tensors == {} and steps == {"a": 0, "b": 0}
    apply(optimizer)
    import_state(optimizer, ["a", "b"], tensors, steps)
    assert export_state(optimizer, ["a", "b"]) == ({}, {"a": 0, "b": 0})


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    held = parameters(9, 2, torch.float32)
    names = ["a", "b"]
    optimizer = build_optimizer(held, SPEC)
    apply(optimizer)
    tensors, steps = export_state(optimizer, names)
    before = bits(list(tensors.values()))
    misshapen = {**tensors, "exp_avg/b": torch.zeros(2)}
    for bad_tensors, bad_steps, says in (
        ({k: v for k, v in tensors.items() if k != "exp_avg_sq/a"}, steps, "exp_avg_sq/a"),
        ({**tensors, "exp_avg/c": tensors["exp_avg/a"]}, steps, "exp_avg/c"),
        (misshapen, steps, r"exp_avg of b: got torch.float32 \[2\], wanted torch.float32 \[33, 5\]"),
        ({k: v.double() for k, v in tensors.items()}, steps, "at this precision"),
        (tensors, {"a": 1}, "unknown entries"),
        (tensors, {"a": 1, "b": -1}, "whole number"),
    ):
        with pytest.raises(OptimizerError, match=says):
            import_state(optimizer, names, bad_tensors, bad_steps)
    assert bits(list(export_state(optimizer, names)[0].values())) == before
    with pytest.raises(OptimizerError, match="one per parameter"):
        export_state(optimizer, ["a"])
    with pytest.raises(OptimizerError, match="one per parameter"):
        export_state(optimizer, ["a", "a"])


def test_a_non_finite_coefficient_is_refused_before_anything_moves() -> None:
    held = parameters(1, 3, torch.float32)
    before = bits(list(held))
    with pytest.raises(OptimizerError, match="skip ticks"):
        apply(build_optimizer(held, SPEC), math.nan)
    assert bits(list(held)) == before and all(p.grad is not None for p in held)


def test_learning_rate_values() -> None:
    warm = OptimizerSpec(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(warm, s) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    linear = OptimizerSpec(learning_rate=1.0, warmup_steps=2, schedule="linear", total_steps=6, final_fraction=0.2)
    assert [learning_rate(linear, s) for s in range(9)] == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    all_warmup = OptimizerSpec(learning_rate=1.0, warmup_steps=2, schedule="cosine", total_steps=2)
    assert [learning_rate(all_warmup, s) for s in range(4)] == pytest.approx([0.5, 1, 1, 0])
    cosine = OptimizerSpec(learning_rate=2.0, schedule="cosine", total_steps=4)
    assert [learning_rate(cosine, s) for s in range(6)] == pytest.approx([2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0, 0])


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 20),
    length=st.integers(1, 50),
    floor=st.floats(0, 1),
    step=st.integers(0, 200),
)
def test_learning_rate_stays_between_its_ends(schedule: str, warmup: int, length: int, floor: float, step: int) -> None:
    spec = OptimizerSpec(
        1e-4, schedule=schedule, warmup_steps=warmup, total_steps=warmup + length, final_fraction=floor
    )  # type: ignore[arg-type]
    rate = learning_rate(spec, step)
    assert rate == learning_rate(spec, step)
    assert 0.0 <= rate <= 1e-4 * (1 + 1e-12)
    if step >= warmup and schedule != "constant":
        assert learning_rate(spec, step + 1) <= rate * (1 + 1e-12)
        assert rate >= 1e-4 * floor * (1 - 1e-12)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"learning_rate": -1.0}, "learning_rate: got -1.0"),
        ({"beta1": 1.0}, "beta1"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"schedule": "step"}, "constant, linear or cosine"),
        ({"schedule": "cosine", "total_steps": 2, "warmup_steps": 3}, "total_steps: got 2, wanted >= 3"),
    ],
)
def test_settings_are_checked(bad: dict[str, object], says: str) -> None:
    with pytest.raises(OptimizerError, match=says):
        OptimizerSpec(**bad)  # type: ignore[arg-type]
    with pytest.raises(OptimizerError, match="at least one"):
        build_optimizer([], OptimizerSpec())
    with pytest.raises(OptimizerError, match="committed_steps"):
        learning_rate(OptimizerSpec(), -1)
