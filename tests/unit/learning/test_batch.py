"""A batch as stages work on it: slices, microbatches, and the columns that belong to each."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from swarm_core.learning.batch import Batch, make_batch
from swarm_core.learning.errors import MicrobatchError
from swarm_core.learning.microbatch import Sample, pack_rows, split_microbatches


def sample(rng: random.Random, masked: bool = True) -> Sample:
    p, c = rng.randint(1, 9), rng.randint(1, 7)
    ids = torch.tensor([rng.randrange(1000) for _ in range(p + c)])
    mask = torch.tensor([rng.random() < 0.7 for _ in range(c)]) if masked else None
    return Sample(ids[:p], ids[p:], rng.gauss(0, 1), -torch.rand(c, generator=_generator(rng)), mask_C=mask)


def _generator(rng: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.randrange(1 << 30))


def make(seed: int, counts: tuple[int, ...], size: int = 3) -> tuple[Batch, list[list[Sample]]]:
    rng = random.Random(seed)
    parts = [[sample(rng, masked=i % 2 == 0) for i in range(count)] for count in counts]
    return make_batch(7, 5, parts, [10 * n for n in counts], [n + 2 for n in counts], size), parts


def by_length(part: list[Sample]) -> list[Sample]:
    return sorted(part, key=lambda s: len(s.prompt_ids) + len(s.completion_ids))


COUNTS = [(4,), (3, 3), (5, 0, 1), (0, 2), (0,), (0, 0), (7, 1, 9)]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_microbatches_are_those_of_the_samples_slice_by_slice(counts: tuple[int, ...], size: int) -> None:
    batch, parts = make(1, counts, size)
    assert batch.microbatches == tuple(-(-n // size) for n in counts)
    assert (batch.slice_tokens, batch.slice_sequences) == ([10 * n for n in counts], [n + 2 for n in counts])
    for index, part in enumerate(parts):
        for m, wanted in enumerate(split_microbatches(by_length(part), size) if part else []):
            got = batch.microbatch(index, m)
            assert got.layout == wanted.layout == batch.layout(index, m)
            assert wanted.ids_BT is not None and torch.equal(batch.ids(index, m), wanted.ids_BT)
            for name in ("targets_M", "advantages_M", "active_M", "sampler_logprobs_M"):
                assert torch.equal(getattr(got, name), getattr(wanted, name)), name
            assert got.old_logprobs_M is None and batch.reference(index, m) is None


@pytest.mark.parametrize("sequences", [1, 3, 8, 100])
def test_a_probe_is_made_of_sequences_spread_over_its_slice(sequences: int) -> None:
    batch, _ = make(8, (6, 0, 13), 4)
    for n in range(sum(batch.microbatches)):  # some columns of every sequence, to be found again
        batch.keep_old(*batch.place(n), torch.randn(batch.layout(*batch.place(n)).targets))
    single = replace(batch, microbatch_size=1)  # each sequence by itself
    probe = batch.probe(2, sequences)
    assert probe.microbatches == (1,)
    n = min(sequences, 13)
    picked = [(2 * i + 1) * 13 // (2 * n) for i in range(n)]
    wanted = [single.microbatch(2, i) for i in picked]
    got = probe.microbatch(0, 0)
    assert got.layout.lengths == tuple(mb.layout.lengths[0] for mb in wanted)
    for name in ("targets_M", "advantages_M", "active_M", "sampler_logprobs_M", "old_logprobs_M"):
        assert torch.equal(getattr(got, name), torch.cat([getattr(mb, name) for mb in wanted])), name
    ids = [single.ids(2, i)[0] for i in picked]
    assert torch.equal(pack_rows(probe.ids(0, 0).unsqueeze(2), got).squeeze(1), torch.cat(ids))
    assert (probe.slice_tokens, probe.slice_sequences) == ([int(got.active_M.sum())], [n])
    assert probe.reference(0, 0) is None and replace(batch, ids_N=None).probe(2, sequences).ids_N is None


@pytest.mark.parametrize(("slice_", "sequences"), [(1, 4), (2, 0)])
def test_nothing_cannot_be_probed(slice_: int, sequences: int) -> None:
    batch, _ = make(8, (6, 0, 13), 4)
    with pytest.raises(MicrobatchError, match="probe"):
        batch.probe(slice_, sequences)


@pytest.mark.parametrize("held", [True, False], ids=["scored", "not-scored"])
@pytest.mark.parametrize("counts", COUNTS)
def test_a_slice_by_itself_has_the_microbatches_it_had_in_the_batch(counts: tuple[int, ...], held: bool) -> None:
    batch, _ = make(9, counts, 3)
    if held:
        generator = torch.Generator().manual_seed(9)
        for n in range(sum(batch.microbatches)):
            old_M, reference_M = torch.randn(2, batch.layout(*batch.place(n)).targets, generator=generator)
            batch.keep_old(*batch.place(n), old_M)
            batch.keep_reference(*batch.place(n), reference_M)
    for index, count in enumerate(batch.microbatches):
        only = batch.only(index)
        assert only.microbatches == (count,)
        assert (only.slice_tokens, only.slice_sequences) == (
            [batch.slice_tokens[index]],
            [batch.slice_sequences[index]],
        )
        for m in range(count):
            got, wanted = only.microbatch(0, m), batch.microbatch(index, m)
            assert got.layout == wanted.layout and torch.equal(only.ids(0, m), batch.ids(index, m))
            for name in ("targets_M", "advantages_M", "active_M", "sampler_logprobs_M"):
                assert torch.equal(getattr(got, name), getattr(wanted, name)), name
            kept = [(got.old_logprobs_M, wanted.old_logprobs_M), (only.reference(0, m), batch.reference(index, m))]
            for a, b in kept:
                assert (a is not None) == (b is not None) == held and (a is None or torch.equal(a, b))
            for share in (True, False):
                a, b = only.crossing(0, m, share=share), batch.crossing(index, m, share=share)
                assert [rows for _, rows in a.parts] == [rows for _, rows in b.parts]
                assert (a.sent_U is None) == (not share) and (not share or torch.equal(a.sent_U, b.sent_U))
        assert replace(batch, ids_N=None).only(index).ids_N is None


def test_sequences_of_equal_length_keep_their_order() -> None:
    one = torch.tensor([1])
    equal = [Sample(one, torch.tensor([i]), 1.0, torch.zeros(1)) for i in range(5)]
    assert make_batch(0, 0, [equal], [5], [5], 2).targets_M.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("counts", [(5, 0, 4), (3, 3)])
def test_the_score_pass_counts_through_all_slices(counts: tuple[int, ...]) -> None:
    batch, _ = make(2, counts, 2)
    places = [batch.place(n) for n in range(sum(batch.microbatches))]
    assert places == [(i, m) for i, count in enumerate(batch.microbatches) for m in range(count)]
    with pytest.raises(MicrobatchError, match="batch 7 has no"):
        batch.place(sum(batch.microbatches))


def test_old_and_reference_log_probs_come_back_where_they_were_kept() -> None:
    batch, _ = make(3, (4, 0, 5), 2)
    generator = torch.Generator().manual_seed(0)
    kept: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    for n in reversed(range(sum(batch.microbatches))):
        place = batch.place(n)
        targets = batch.layout(*place).targets
        old, reference = torch.randn(2, targets, generator=generator)
        old.requires_grad_()
        batch.keep_old(*place, old)
        batch.keep_reference(*place, reference)
        kept[place] = (old.detach(), reference)
    assert batch.old_logprobs_M is not None and not batch.old_logprobs_M.requires_grad
    for place, (old, reference) in kept.items():
        got = batch.microbatch(*place).old_logprobs_M
        found = batch.reference(*place)
        assert got is not None and torch.equal(got, old)
        assert found is not None and torch.equal(found, reference)


def test_log_probs_that_nobody_has_kept_are_nan_and_not_zero() -> None:
    batch, _ = make(4, (4,), 2)
    batch.keep_old(0, 0, torch.zeros(batch.layout(0, 0).targets))
    old = batch.microbatch(0, 1).old_logprobs_M
    assert old is not None and old.isnan().all()


def test_only_stage_0_has_token_ids() -> None:
    batch, _ = make(5, (2,))
    later = replace(batch, ids_N=None)
    with pytest.raises(MicrobatchError, match="only stage 0"):
        later.ids(0, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"slices": []},
        {"slices": [0, 2, 1, 4]},
        {"slices": [1, 2, 4]},
        {"slices": [0, 2, 3]},
        {"slices": [0, 4]},
        {"completion_lengths": [1]},
        {"advantages": [1.0] * 5},
        {"slice_tokens": [1]},
        {"slice_sequences": [1, 2, 3]},
        {"targets_M": torch.zeros(1, dtype=torch.int64)},
        {"sampler_logprobs_M": torch.zeros(99)},
        {"active_M": torch.zeros(0, dtype=torch.bool)},
    ],
)
def test_columns_that_do_not_fit_together_are_refused(change: dict[str, Any]) -> None:
    batch, _ = make(6, (2, 2))
    with pytest.raises(MicrobatchError):
        replace(batch, **change)
