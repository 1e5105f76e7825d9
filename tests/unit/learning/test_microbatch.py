"""Row bookkeeping: which positions are real, which predict a completion token, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_core.learning.errors import MicrobatchError
from swarm_core.learning.microbatch import (
    Layout,
    Sample,
    completion_rows,
    from_columns,
    from_samples,
    pack_rows,
    pad_ids,
    split_microbatches,
    unpack_rows,
)

LENGTHS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7)), min_size=1, max_size=6)


def sample(prompt: list[int], completion: list[int], advantage: float = 1.0, **extra: torch.Tensor) -> Sample:
    return Sample(
        torch.tensor(prompt), torch.tensor(completion), advantage, torch.full((len(completion),), -1.0), **extra
    )


def test_a_microbatch_by_hand() -> None:
    mb = from_samples([sample([5, 6], [7, 8, 9], 0.5), sample([1], [2], -1.0)])
    assert mb.ids_BT is not None
    assert mb.ids_BT.tolist() == [[5, 6, 7, 8, 9], [1, 2, 0, 0, 0]]
    assert mb.lengths_B.tolist() == [5, 2]
    assert mb.valid_index_N.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert mb.completion_index_M.tolist() == [1, 2, 3, 5]
    assert mb.targets_M.tolist() == [7, 8, 9, 2]
    assert mb.sequence_M.tolist() == [0, 0, 0, 1]
    assert mb.advantages_M.tolist() == [0.5, 0.5, 0.5, -1.0]
    assert mb.active_M.all() and mb.active_M.dtype == torch.bool
    assert mb.old_logprobs_M is None


@given(LENGTHS)
@settings(max_examples=60, deadline=None)
def test_the_next_token_of_every_completion_row_is_its_target(lengths: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(sum(p * 31 + c for p, c in lengths))
    draw = [torch.randint(1, 99, (p + c,), generator=generator) for p, c in lengths]
    samples = [Sample(ids[:p], ids[p:], 1.0, torch.zeros(c)) for ids, (p, c) in zip(draw, lengths, strict=True)]
    mb = from_samples(samples)
    assert mb.ids_BT is not None
    flat = mb.ids_BT.flatten()
    assert torch.equal(flat[mb.completion_index_M + 1], mb.targets_M)
    assert torch.equal(flat[mb.valid_index_N], torch.cat(draw))
    assert mb.layout.tokens == len(mb.valid_index_N) and mb.layout.targets == len(mb.completion_index_M)
    assert torch.equal(pad_ids(torch.cat(draw), mb.layout), mb.ids_BT)


@given(LENGTHS)
@settings(max_examples=40, deadline=None)
def test_rows_survive_packing_and_pads_come_back_as_zeros(lengths: list[tuple[int, int]]) -> None:
    layout = Layout(tuple(p for p, _ in lengths), tuple(c for _, c in lengths))
    h_BTD = torch.randn(layout.sequences, layout.width, 3)
    back = unpack_rows(pack_rows(h_BTD, layout), layout)
    for row, length in enumerate(layout.lengths):
        assert torch.equal(back[row, :length], h_BTD[row, :length])
        assert not back[row, length:].any()


def test_gradients_pass_through_packing() -> None:
    layout = Layout((2, 1), (3, 1))
    h_BTD = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    h_NH = pack_rows(h_BTD, layout)
    (unpack_rows(h_NH, layout) * torch.arange(5.0).view(1, 5, 1)).sum().backward()
    wanted = torch.arange(5.0, dtype=torch.float64).view(1, 5, 1).expand(2, 5, 4).clone()
    wanted[1, 2:] = 0
    assert h_BTD.grad is not None and torch.equal(h_BTD.grad, wanted)
    assert torch.equal(completion_rows(h_BTD, layout)[3], h_BTD[1, 0])


def test_index_tensors_made_in_inference_mode_serve_a_backward_pass() -> None:
    layout = Layout((2,), (2,))
    with torch.inference_mode():
        pack_rows(torch.randn(1, 4, 2), layout)
        completion_rows(torch.randn(1, 4, 2), layout)
    h_BTD = torch.randn(1, 4, 2, requires_grad=True)
    (pack_rows(h_BTD, layout).sum() + completion_rows(h_BTD, layout).sum()).backward()
    assert h_BTD.grad is not None


def test_splitting_keeps_the_order_and_the_rest() -> None:
    samples = [sample([1, 2], [3] * (index + 1), float(index)) for index in range(5)]
    parts = split_microbatches(samples, 2)
    assert [part.layout.completion_lengths for part in parts] == [(1, 2), (3, 4), (5,)]
    assert split_microbatches([], 2) == []


def test_the_last_stage_needs_no_prompt_ids() -> None:
    whole = from_samples([sample([5, 6], [7, 8, 9], 0.5), sample([1], [2], -1.0)])
    mb = from_columns(whole.layout, whole.targets_M, [0.5, -1.0], whole.sampler_logprobs_M)
    assert mb.ids_BT is None
    assert torch.equal(mb.advantages_M, whole.advantages_M) and torch.equal(mb.active_M, whole.active_M)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: sample([], [1]), "prompt_ids"),
        (lambda: Sample(torch.tensor([1]), torch.tensor([1.0]), 0.0, torch.zeros(1)), "completion_ids"),
        (lambda: Sample(torch.tensor([1]), torch.tensor([1]), 0.0, torch.zeros(2)), "sampler_logprobs_C"),
        (lambda: from_samples([]), "samples"),
        (lambda: from_samples([sample([1], [1]), sample([1], [1], old_logprobs_C=torch.zeros(1))]), "old_logprobs_C"),
        (lambda: from_samples([sample([1], [1], float("nan"))]), "advantages"),
        (lambda: Layout((1, 2), (1,)), "layout"),
        (lambda: Layout((1,), (0,)), "layout"),
        (lambda: from_columns(Layout((1,), (2,)), torch.tensor([1]), [1.0], torch.zeros(1)), "targets_M"),
        (lambda: from_columns(Layout((1,), (1,)), torch.tensor([1]), [], torch.zeros(1)), "advantages"),
        (lambda: split_microbatches([], 0), "microbatch_size"),
        (lambda: unpack_rows(torch.zeros(3, 2), Layout((1,), (1,))), "h_NH"),
        (lambda: pack_rows(torch.zeros(1, 3, 2), Layout((1,), (1,))), "h_BTD"),
        (lambda: pad_ids(torch.zeros(3, dtype=torch.int64), Layout((1,), (1,))), "ids_N"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make: object, field: str) -> None:
    with pytest.raises(MicrobatchError) as caught:
        make()  # type: ignore[operator]
    assert caught.value.field == field and "wanted" in str(caught.value)
