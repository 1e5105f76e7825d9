"""Packets as bytes, one for each layout: whoever changes what they mean, or how they are made, changes FORMAT, too.

The bases are of axes, so that no product rounds and the rows that arrive are the same on every machine.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from codec.basis import Basis
from codec.link_codec import LinkCodec
from codec.reuse import ReuseStore
from codec.spec import Direction, LinkSpec

FORWARD, BACKWARD = Direction
AXES = Basis.orthonormal(7, torch.eye(4)[:, [2, 0]])
ROWS = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 100.0, -0.25, 1e-3]])
GOLDEN = {
    "identity": (
        LinkSpec("identity", 4, zstd="off"),
        FORWARD,
        None,
        (
            "9bcc01cc00cc00cc01cc00ce00000002ce00000004ceffffffffce00000020ce00000020ce2e079711"
            "0000803f000000c00000003f00004040000000000000c842000080be6f12833a"
        ),
        ROWS,
    ),
    "none": (
        LinkSpec("none", 4, zstd="off"),
        BACKWARD,
        None,
        (
            "9bcc01cc01cc01cc00cc00ce00000002ce00000004ceffffffffce00000010ce00000010cec9f7a198"
            "803f00c0003f40400000c84280be833a"
        ),
        ROWS.to(torch.bfloat16).float(),
    ),
    "lowrank": (
        LinkSpec("lowrank", 4, 2, 2, zstd="off"),
        FORWARD,
        AXES,
        "9bcc01cc02cc00cc00cc00ce00000002ce00000002ce00000007ce00000008ce00000008cebf38395b003f803f80be0000",
        ROWS * torch.tensor([1.0, 0, 1, 0]),
    ),
}
GOLDEN_ZSTD = (
    "9bcc01cc01cc00cc00cc01ce00000040ce00000004ceffffffffce00000019ce00000200ce1fe1ae48"
    "28b52ffd6000017d000040803f00c0003f40400100f5530b17"
)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_packets_still_decode_and_are_still_made(name: str) -> None:
    """Format 1."""
    spec, direction, basis, packet, arrived_NH = GOLDEN[name]
    assert torch.equal(LinkCodec(spec).decode(bytes.fromhex(packet), 2, direction, basis), arrived_NH)
    assert LinkCodec(spec).encode(ROWS, direction, basis).hex() == packet


def test_a_golden_zstd_packet_still_decodes() -> None:
    """Only decoded: another zstd release may well compress to other bytes."""
    arrived_NH = LinkCodec(LinkSpec("none", 4)).decode(bytes.fromhex(GOLDEN_ZSTD), 64, FORWARD)
    assert torch.equal(arrived_NH, torch.tensor([1.0, -2.0, 0.5, 3.0]).expand(64, 4))


QUANTISED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "golden" / "quantised_packets.json").read_text()
)
QUANTISED_AXES = Basis.orthonormal(7, torch.eye(4)[:, [2, 0]], step=0.25)
KEYS = [(1, 20), (2, 12)]


def quantised_rows(turn: int = 0) -> torch.Tensor:
    """32 rows x 4 of exact binary fractions: plain ones, a zero row, a massive one and one of few large numbers."""
    number_NH = torch.arange(32 * 4).reshape(32, 4)
    x_NH = ((number_NH * 37 + turn * (number_NH % 5 == 0)) % 64 - 32) / 16.0
    x_NH[3], x_NH[9, 2], x_NH[20] = 0.0, 4096.0, 0.01 * x_NH[20]
    return x_NH


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_golden_packets_still_decode_and_are_still_made(name: str) -> None:
    """Format 2, in all its layouts; with references, the packets of three passes. Values, to the bit, are the golden
    rows; the bytes too, but where zstd made them."""
    golden = QUANTISED[name]
    spec, direction = LinkSpec(**golden["spec"]), Direction[golden["direction"]]
    sender, receiver = LinkCodec(spec), LinkCodec(spec)
    ours, theirs = ReuseStore(1 << 16), ReuseStore(1 << 16)
    for turn, (packet, columns) in enumerate(zip(golden["packets"], golden["arrived"], strict=True)):
        sent, held = (ours.rows(KEYS), theirs.rows(KEYS)) if spec.reuse else (None, None)
        made = sender.encode(quantised_rows(turn), direction, QUANTISED_AXES, rows=sent)
        assert made.hex() == packet or spec.zstd == "auto"
        arrived_NH = receiver.decode(bytes.fromhex(packet), 32, direction, QUANTISED_AXES, rows=held)
        expected_NH = torch.frombuffer(bytearray.fromhex(columns), dtype=torch.float32).reshape(32, 4)
        assert torch.equal(arrived_NH, expected_NH)
        ours.settle(keep=True)
        theirs.settle(keep=True)
