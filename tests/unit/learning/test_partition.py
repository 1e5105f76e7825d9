"""Cutting layers into stages: totals, balance, overrides, readable refusals."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_core.learning.partition import (
    PartitionError,
    Span,
    head_flops,
    layer_flops,
    partition,
    stage_flops,
    whole,
)


@dataclass(frozen=True)
class Counts:
    layers: int
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    intermediate: int = 256
    vocab: int = 1000


QWEN25_1_5B = Counts(28, 1536, 12, 2, 128, 8960, 151_936)


def sizes(spans: list[Span]) -> list[int]:
    return [len(span.layers) for span in spans]


@settings(max_examples=60, deadline=None)
@given(layers=st.integers(1, 9), stages=st.integers(1, 9), vocab=st.sampled_from([2, 500, 5_000, 50_000]))
def test_the_slowest_stage_is_the_fastest_possible(layers: int, stages: int, vocab: int) -> None:
    shape = Counts(layers, vocab=vocab)
    if stages > layers:
        with pytest.raises(PartitionError, match="stages <= layers"):
            partition(shape, stages)
        return
    spans = partition(shape, stages)
    assert [i for span in spans for i in span.layers] == list(range(layers))
    slowest = max(stage_flops(shape, span) for span in spans)
    cuts = itertools.combinations(range(1, layers), stages - 1)
    for cut in cuts:
        edges = [0, *cut, layers]
        other = [Span(s, stages, edges[s], edges[s + 1]) for s in range(stages)]
        assert slowest <= max(stage_flops(shape, span) for span in other)


def test_a_heavy_head_takes_layers_off_the_last_stage() -> None:
    assert sizes(partition(Counts(12, vocab=2), 3)) == [4, 4, 4]
    assert sizes(partition(QWEN25_1_5B, 2)) == [16, 12]
    assert head_flops(QWEN25_1_5B) > 4 * layer_flops(QWEN25_1_5B)
    assert sizes(partition(Counts(4, vocab=10_000_000), 3)) == [1, 2, 1]


def test_layer_flops_count_two_per_weight_of_a_known_model() -> None:
    weights = 1536 * 1536 * 2 + 2 * 1536 * 256 + 3 * 1536 * 8960  # q, o; k, v; gate, up, down
    assert layer_flops(QWEN25_1_5B) == 2 * weights + 2 * 1024 * 1536


def test_stage_flops_count_the_head_once_and_last() -> None:
    spans = partition(QWEN25_1_5B, 3, split=[10, 10, 8])
    layer = layer_flops(QWEN25_1_5B)
    assert [stage_flops(QWEN25_1_5B, span) for span in spans] == [
        10 * layer,
        10 * layer,
        8 * layer + 2 * 1536 * 151_936,
    ]


def test_first_and_last() -> None:
    spans = partition(Counts(3), 3)
    assert [(s.is_first, s.is_last) for s in spans] == [(True, False), (False, False), (False, True)]
    one = whole(Counts(3))
    assert one == partition(Counts(3), 1)[0]
    assert one.is_first and one.is_last


def test_a_given_split_is_taken() -> None:
    assert sizes(partition(Counts(6), 3, split=[1, 4, 1])) == [1, 4, 1]


@pytest.mark.parametrize(
    ("stages", "split", "says"),
    [
        (0, None, "at least 1"),
        (7, None, "7 stages for 6 layers"),
        (2, [3, 4], "which is 7 layers, wanted 6, the model's layers; change it by -1"),
        (2, [3, 2], r"change it by \+1"),
        (2, [6, 0], "whole numbers >= 1"),
        (2, [5, True], "whole numbers >= 1"),
        (3, [3, 3], "2 numbers .* wanted 3, one per stage"),
    ],
)
def test_refusals_say_what_to_do(stages: int, split: list[int] | None, says: str) -> None:
    with pytest.raises(PartitionError, match=says) as caught:
        partition(Counts(6), stages, split)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [(2, 2, 1, 2), (-1, 2, 0, 1), (0, 2, 2, 2), (0, 2, 1, 2), (1, 2, 0, 2)])
def test_a_span_that_makes_no_sense_cannot_be_built(wrong: tuple[int, int, int, int]) -> None:
    with pytest.raises(PartitionError):
        Span(*wrong)
