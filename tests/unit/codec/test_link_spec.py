"""Sizes are pure functions of integers, and a spec that makes no sense is refused with a message that says why."""

import subprocess
import sys
from pathlib import Path

import pytest

import codec.spec
from codec.errors import CodecError, SpecError
from codec.header import HEADER2_BYTES, HEADER_BYTES, Element, Kind
from codec.spec import (
    Direction,
    LinkSpec,
    dense_bytes,
    largest_packet_bytes,
    most_outliers,
    packet_bytes,
    payload_bytes,
)

FORWARD, BACKWARD = Direction
LOWRANK = {"kind": "lowrank", "width": 8, "rank_forward": 2, "rank_backward": 2}


def test_sizes_of_each_kind() -> None:
    assert payload_bytes(LinkSpec("identity", 10), FORWARD, 7) == 7 * 10 * 4
    assert payload_bytes(LinkSpec("identity", 10, dtype="fp64"), BACKWARD, 7) == 7 * 10 * 8
    assert payload_bytes(LinkSpec("none", 10), BACKWARD, 7) == 7 * 10 * 2 == dense_bytes(10, 7)
    lowrank = LinkSpec("lowrank", 10, 3, 5)
    assert payload_bytes(lowrank, FORWARD, 7) == 7 * 3 * 2
    assert payload_bytes(lowrank, BACKWARD, 7) == 7 * 5 * 2
    assert packet_bytes(lowrank, BACKWARD, 7) == 41 + 7 * 5 * 2
    assert packet_bytes(lowrank, BACKWARD, 0) == HEADER_BYTES == 41


def test_exact_backward_costs_the_forward_rank_and_uses_its_basis() -> None:
    exact = LinkSpec("lowrank", 10, 3, backward="exact")
    assert payload_bytes(exact, BACKWARD, 7) == payload_bytes(exact, FORWARD, 7) == 7 * 3 * 2
    assert exact.basis_direction(BACKWARD) == FORWARD
    assert LinkSpec("lowrank", 10, 3, 5).basis_direction(BACKWARD) == BACKWARD
    assert LinkSpec("none", 10).basis_direction(BACKWARD) is None


def test_names_on_the_wire() -> None:
    assert [LinkSpec("identity", 4).wire_kind, LinkSpec("none", 4).wire_kind] == [Kind.IDENTITY, Kind.NONE]
    lowrank = LinkSpec("lowrank", 4, 1, 1, quantiser_forward="int4", quantiser_backward="uniform")
    assert [lowrank.element(direction) for direction in Direction] == [Element.INT4, Element.UNIFORM]
    assert [LinkSpec("lowrank", 4, 1, 1).format(FORWARD), lowrank.format(FORWARD)] == [1, 2]
    with_outliers = LinkSpec("lowrank", 4, 1, 1, outliers=5.0)
    assert [with_outliers.format(direction) for direction in Direction] == [2, 1]
    assert [element.bytes for element in Element] == [2, 4, 8, 1, 1, 2]


def test_sizes_of_quantised_coefficients() -> None:
    """int8 and int4: a bf16 scale a row beside the integers; uniform: two bytes a number at the most."""
    spec = LinkSpec("lowrank", 100, 30, 30, quantiser_forward="int8", quantiser_backward="int4", outliers=8.0)
    assert packet_bytes(spec, FORWARD, 65) == HEADER2_BYTES + 65 * (2 + 30) and HEADER2_BYTES == 47
    assert packet_bytes(spec, BACKWARD, 65) == HEADER2_BYTES + 65 * 2 + 30 * 33
    assert packet_bytes(spec, FORWARD, 65, columns=10) == HEADER2_BYTES + 65 * (2 + 10)
    assert packet_bytes(spec, FORWARD, 65, 10, 3) == HEADER2_BYTES + 65 * (2 + 10) + 3 * (4 + 400)
    assert largest_packet_bytes(spec, FORWARD, 65) == packet_bytes(spec, FORWARD, 65, 30, 4)
    assert largest_packet_bytes(spec, BACKWARD, 65) == packet_bytes(spec, BACKWARD, 65)
    assert most_outliers(spec, FORWARD, 15) == 0 and most_outliers(spec, BACKWARD, 1000) == 0
    uniform = LinkSpec("lowrank", 100, 30, 30, quantiser_forward="uniform")
    assert 65 * 60 < payload_bytes(uniform, FORWARD, 65) < 65 * 60 * 1.1
    for columns, outliers, complaint in ((31, 0, "columns"), (0, 0, "columns"), (30, 5, "outliers"), (30, -1, "outl")):
        with pytest.raises(SpecError, match=complaint):
            packet_bytes(spec, FORWARD, 65, columns, outliers)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"kind": "int8", "width": 8}, "link kind: got 'int8'"),
        ({"kind": "none", "width": 0}, "link width: got 0"),
        ({"kind": "none", "width": True}, "link width: got True"),
        ({"kind": "none", "width": 8.0}, "link width: got 8.0"),
        (
            {"kind": "lowrank", "width": 8, "rank_forward": 9, "rank_backward": 2},
            "rank_forward: got 9, wanted an integer in 1..8",
        ),
        ({"kind": "lowrank", "width": 8, "rank_forward": 2, "rank_backward": 0}, "rank_backward: got 0"),
        ({"kind": "lowrank", "width": 8, "rank_forward": 0, "backward": "exact"}, "rank_forward: got 0"),
        ({"kind": "none", "width": 8, "backward": "approximate"}, "link backward"),
        ({"kind": "none", "width": 8, "zstd": "on"}, "link zstd"),
        ({"kind": "identity", "width": 8, "dtype": "bf16"}, "link dtype"),
        ({"kind": "none", "width": 8, "dtype": "fp64"}, "wanted fp32"),
        ({"kind": "none", "width": 8, "quantiser_forward": "int3"}, "link quantiser_forward"),
        ({"kind": "none", "width": 8, "outliers": 0.5}, "link outliers: got 0.5"),
        ({"kind": "none", "width": 8, "outliers": float("nan")}, "link outliers: got nan"),
        (LOWRANK | {"reuse": True}, "link reuse: got quantiser_forward bf16, wanted uniform"),
        (LOWRANK | {"stochastic": True, "quantiser_forward": "uniform"}, "link stochastic"),
        (LOWRANK | {"exact_step": float("nan")}, "link exact_step: got nan"),
        (LOWRANK | {"backward": "exact", "quantiser_backward": "uniform"}, "link exact_step: got 0.0"),
        (LOWRANK | {"gradient_scale": "packet", "quantiser_backward": "int8"}, "link gradient_scale"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, object], complaint: str) -> None:
    with pytest.raises(SpecError) as caught:
        LinkSpec(**arguments)  # type: ignore[arg-type]
    assert complaint in str(caught.value)
    assert isinstance(caught.value, CodecError)


def test_ranks_are_not_looked_at_where_they_mean_nothing() -> None:
    assert LinkSpec("identity", 8, 77, 77).columns(FORWARD) == 8
    assert LinkSpec("lowrank", 8, 2, 77, backward="exact").columns(BACKWARD) == 2


@pytest.mark.parametrize("rows", [-1, 2**32, 1.0, True])
def test_row_counts_out_of_range_are_refused(rows: int) -> None:
    with pytest.raises(SpecError, match="packet rows"):
        payload_bytes(LinkSpec("none", 1), FORWARD, rows)


def test_a_payload_beyond_its_length_field_is_refused() -> None:
    assert payload_bytes(LinkSpec("none", 1), FORWARD, 2**31 - 1) == 2**32 - 2
    with pytest.raises(SpecError, match="smaller microbatches"):
        payload_bytes(LinkSpec("none", 1), FORWARD, 2**31)


def test_sizes_need_no_torch() -> None:
    program = "import sys, codec.spec; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    root = Path(codec.spec.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
