"""Bases as changes of the version before: bit for bit the same, only when smaller, and nothing else is taken for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec.spec import Direction, LinkSpec
from swarm_core.wire.bases import as_changes, as_whole, matrix_of
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import BasisMatrix, BasisSet, from_bytes, to_bytes

F, B = Direction.FORWARD, Direction.BACKWARD
KEYS = [(boundary, direction) for boundary in (0, 1) for direction in (F, B)]
SPEC = LinkSpec("lowrank", 64, 24, 24)


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bases(version: int, seed: int = 0, ranks: tuple[int, ...] = (16, 8, 16, 8), pairs: int = 2) -> BasisSet:
    """The first `pairs` matrices with a decoder of their own."""
    matrices = []
    for i, (key, rank) in enumerate(zip(KEYS, ranks, strict=True)):
        decoder_RH = seeded(seed + 50 + i, rank, 64) if i < pairs else None
        matrices.append(matrix_of(key, seeded(seed + i, 64, rank), decoder_RH, step=0.5))
    return BasisSet(version, 40, matrices)


def value_bytes(bases: BasisSet) -> int:
    return sum(len(m.values) + len(m.decoder) for m in bases.matrices)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 24), min_size=4, max_size=4),
    st.lists(st.integers(1, 24), min_size=4, max_size=4),
    st.integers(0, 4),
    st.integers(0, 4),
    st.booleans(),
)
def test_what_comes_back_is_what_was_sent_whatever_steering_made_of_it(
    before: list[int], after: list[int], had: int, has: int, same: bool
) -> None:
    old = bases(3, ranks=tuple(before), pairs=had)
    new = bases(4, seed=0 if same else 9, ranks=tuple(before if same else after), pairs=has)
    sent = from_bytes(BasisSet, to_bytes(as_changes(new, old)))
    assert as_whole(sent, old, SPEC) == new
    assert value_bytes(sent) <= value_bytes(new)


def test_a_matrix_that_stays_costs_next_to_nothing_and_a_new_one_less_than_whole() -> None:
    old = bases(3)
    new = replace(bases(4, seed=9), matrices=[*old.matrices[:2], *bases(4, seed=9).matrices[2:]])
    sent = as_changes(new, old)
    assert (sent.delta, sent.base, sent.version, sent.tick) == (True, 3, 4, 40)
    assert len(sent.matrices[0].values) < 100 and len(sent.matrices[0].decoder) < 100 < len(sent.matrices[2].values)
    assert value_bytes(replace(sent, matrices=sent.matrices[2:])) < 0.95 * value_bytes(
        replace(new, matrices=new.matrices[2:])
    )


def test_what_would_not_be_smaller_goes_whole() -> None:
    new = bases(4)
    bits = (
        torch.randint(0, 256, (4096,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy().tobytes()
    )
    noise = [
        replace(m, values=bits[: len(m.values)], decoder=b"") for m in new.matrices
    ]  # no byte says what the next is
    noisy = replace(new, matrices=noise)
    assert as_changes(noisy, bases(3)) is noisy
    assert as_whole(noisy, None, SPEC) is noisy  # needs nothing


@pytest.mark.parametrize(
    ("held", "why"),
    [
        (None, "came as changes of version 3, here is no version"),
        (bases(2), "came as changes of version 3, here is version 2"),
        (bases(4), "here is version 4"),
        (bases(3, seed=1), "packet base"),  # the right number, other values
        (bases(3, ranks=(15, 8, 16, 8)), "packet base"),
        (BasisSet(3, 40, []), "packet base"),
    ],
)
def test_changes_of_what_is_not_held_are_refused_readably(held: BasisSet | None, why: str) -> None:
    old = bases(3)
    sent = as_changes(replace(old, version=4, matrices=[bumped(m) for m in old.matrices]), old)
    with pytest.raises(BadFrame, match=why) as caught:
        as_whole(sent, held, SPEC)
    assert "\n" not in str(caught.value) and "version 4" in str(caught.value)


def bumped(matrix: BasisMatrix) -> BasisMatrix:
    """One value of it changed by its last bit."""
    return replace(matrix, values=bytes([matrix.values[0] ^ 1]) + matrix.values[1:])


@pytest.mark.parametrize(
    "change", [{"rows": 2**32 - 1}, {"columns": 2**32 - 1}, {"columns": 25}, {"columns": 0}, {"rows": 63}]
)
def test_a_shape_that_the_link_cannot_have_is_refused_before_anything_is_made_of_it(change: dict[str, int]) -> None:
    old = bases(3)
    sent = as_changes(replace(bases(4), version=4), old)
    sent.matrices[1] = replace(sent.matrices[1], **change)
    with pytest.raises(BadFrame, match="the manifest wants 64 x 1..24"):
        as_whole(sent, old, SPEC)


def test_a_damaged_packet_is_refused_or_gives_the_same() -> None:
    old, new = bases(3), bases(4, seed=9)
    sent = as_changes(new, old)
    packet, refused = sent.matrices[0].values, 0
    for place in range(0, len(packet), 37):
        damaged = packet[:place] + bytes([packet[place] ^ 0x10]) + packet[place + 1 :]
        message = replace(sent, matrices=[replace(sent.matrices[0], values=damaged), *sent.matrices[1:]])
        try:
            assert as_whole(message, old, SPEC) == new
        except BadFrame as error:
            assert "boundary 0, as changes of version 3" in str(error)
            refused += 1
    for values in (packet[:-1], packet + b"\0", packet[:20]):
        message = replace(sent, matrices=[replace(sent.matrices[0], values=values), *sent.matrices[1:]])
        with pytest.raises(BadFrame):
            as_whole(message, old, SPEC)
    assert refused > 10
