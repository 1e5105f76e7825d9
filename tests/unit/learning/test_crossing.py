"""Which rows cross: shared prompts cross once, come back whole, and their gradients are the sum over the copies."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm_core.learning.batch import make_batch
from swarm_core.learning.crossing import crossing
from swarm_core.learning.microbatch import Layout, Sample

prompt_lengths = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@st.composite
def microbatches(draw: st.DrawFn) -> tuple[Layout, list[int], list[int]]:
    """(layout, sequence numbers, prompt numbers) of a microbatch, groups not necessarily adjacent."""
    lengths = draw(prompt_lengths)
    prompts = draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=9))
    completions = draw(st.lists(st.integers(1, 4), min_size=len(prompts), max_size=len(prompts)))
    first = draw(st.integers(0, 50))
    layout = Layout(tuple(lengths[p] for p in prompts), tuple(completions))
    return layout, list(range(first, first + len(prompts))), prompts


@given(microbatches(), st.booleans())
def test_what_leaves_arrives_whole(case: tuple[Layout, list[int], list[int]], share: bool) -> None:
    layout, sequences, prompts = case
    found = crossing(layout, sequences, prompts, share=share)
    # A row's content: its prompt's for prompt positions (as causal attention makes it), its own for the completion.
    rows = []
    for s, p, n, c in zip(sequences, prompts, layout.prompt_lengths, layout.completion_lengths, strict=True):
        rows += [(p, -1, i) for i in range(n)] + [(p, s, i) for i in range(c)]
    content_NH = torch.tensor(rows, dtype=torch.float32)
    left_UH = found.leaving(content_NH)
    assert len(left_UH) == found.rows == sum(n for _, n in found.parts)
    assert torch.equal(found.arrived(left_UH), content_NH) and found.repeated_rows == layout.tokens
    if share:
        once = len({tuple(row) for row in rows})
        assert found.rows == once and len({key for key, _ in found.parts}) == len(found.parts)
    else:
        assert found.rows == layout.tokens


def test_gradients_of_copies_come_back_as_their_sum() -> None:
    layout = Layout((2, 2), (1, 2))
    found = crossing(layout, [4, 5], [3, 3], share=True)
    assert found.parts == ((7, 2), (8, 1), (10, 2))
    whole_NH = torch.randn(layout.tokens, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    arrived_UH = found.leaving(whole_NH).detach().requires_grad_()
    weights_NH = torch.arange(21.0).view(7, 3)
    (found.arrived(arrived_UH) * weights_NH).sum().backward()
    assert arrived_UH.grad is not None
    found.leaving(whole_NH).backward(arrived_UH.grad)
    assert whole_NH.grad is not None
    assert torch.equal(whole_NH.grad[:2], weights_NH[:2] + weights_NH[3:5])  # all of it on the copy that was sent
    assert torch.equal(whole_NH.grad[3:5], torch.zeros(2, 3))
    assert torch.equal(whole_NH.grad[5:], weights_NH[5:])


def test_keys_are_the_same_in_other_microbatches_and_groups_stay_together() -> None:
    def sample(prompt: list[int], completion: int) -> Sample:
        ids = torch.arange(completion)
        return Sample(torch.tensor(prompt), ids, 1.0, torch.zeros(completion))

    part = [sample([1, 2], 3), sample([5], 1), sample([1, 2], 1), sample([5], 6)]
    by_group = make_batch(0, 0, [part], [11], [4], 2, keep_groups=True)
    assert by_group.prompts == [0, 0, 1, 1] and by_group.prompt_lengths == [2, 2, 1, 1]
    assert make_batch(0, 0, [part], [11], [4], 2).completion_lengths == [1, 1, 3, 6]
    pairs = [by_group.crossing(0, i, share=True).parts for i in range(2)]
    assert pairs == [((1, 2), (0, 3), (2, 1)), ((3, 1), (4, 1), (6, 6))]
    by_group.microbatch_size = 3
    vars(by_group).pop("_ranges"), vars(by_group).pop("_crossings")
    assert by_group.crossing(0, 0, share=True).parts == ((1, 2), (0, 3), (2, 1), (3, 1), (4, 1))
