"""Slices on their way to the anchor: what stage 0 and the last stage send makes the batch that the tick consumed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from swarm_core.learning.batch import Batch, make_batch
from swarm_core.learning.microbatch import Sample
from swarm_core.wire.corrections import read_slice, slice_message
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import Slice, from_bytes, to_bytes

VOCAB = 50


def a_batch(*, groups: bool) -> Batch:
    generator = torch.Generator().manual_seed(3)

    def ids(n: int) -> torch.Tensor:
        return torch.randint(0, VOCAB, (n,), generator=generator)

    slices = []
    for _ in range(2):
        prompts = [ids(n) for n in (3, 5, 2)]
        slices.append([Sample(p, c := ids(2 + i), 0.5 * i - 1, torch.rand(len(c))) for p in prompts for i in range(4)])
    return make_batch(7, 2, slices, [30, 31], [12, 12], 5, keep_groups=groups)


def same(a: Batch, b: Batch) -> None:
    for name, value in vars(a).items():
        if not name.startswith("_"):
            other = getattr(b, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_a_slice_arrives_as_the_batch_that_the_tick_consumed(groups: bool, alone: bool) -> None:
    batch = a_batch(groups=groups)
    batch.old_logprobs_M = -torch.rand(batch.targets_M.numel())
    part = batch.only(1)
    if alone:
        first = last = from_bytes(Slice, to_bytes(slice_message(part, part, VOCAB)))
    else:
        first = from_bytes(Slice, to_bytes(slice_message(replace(part, old_logprobs_M=None), None, VOCAB)))
        last = from_bytes(Slice, to_bytes(slice_message(None, replace(part, ids_N=None), VOCAB)))
    came = read_slice(first, last, batch.microbatch_size, VOCAB)
    same(part, came)
    assert came.microbatches == (batch.microbatches[1],)
    assert len(set(part.prompts)) == 3  # each travels once, not once a completion
    assert len(first.prompt_ids) == 2 * sum(dict(zip(part.prompts, part.prompt_lengths, strict=True)).values())


def test_without_a_score_pass_there_are_no_old_logprobs() -> None:
    part = a_batch(groups=True).only(0)
    message = slice_message(part, part, VOCAB)
    assert message.scored and not message.old_logprobs
    assert read_slice(message, message, 5, VOCAB).old_logprobs_M is None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"prompt_ids": b"\0\0"}, "bytes of prompts"),
        ({"prompt_ids": b"\xff" * 20}, "vocabulary"),
        ({"old_logprobs": b"\0" * 8}, "old log-probs"),
        ({"old_logprobs": "nan"}, "not finite"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change: dict[str, bytes | str], word: str) -> None:
    part = a_batch(groups=True).only(0)
    message = slice_message(part, part, VOCAB)
    nan = torch.full((part.targets_M.numel(),), float("nan")).numpy().tobytes()
    for name, value in change.items():
        setattr(message, name, nan if value == "nan" else value)
    with pytest.raises(BadFrame, match=word):
        read_slice(message, message, 5, VOCAB)
    whole = slice_message(part, part, VOCAB)
    whole.data.slices = torch.tensor([0, 1, len(part.prompts)], dtype=torch.int32).numpy().tobytes()
    with pytest.raises(BadFrame):
        read_slice(whole, whole, 5, VOCAB)
