"""Shipping snapshots: the real shipper against the anchor's real store, over a stream that loses, breaks and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anchor_node.replay_store import ReplayStore, SnapshotRefused
from swarm_core.wire.messages import FrameKind, Slice, Snapshot, SnapshotHeld
from swarm_worker import snapshots
from swarm_worker.correcting import Capture
from swarm_worker.snapshots import SnapshotShipper

SHAPES = [(128, 64), (64,), (3, 5)]
Deliver = Callable[[Snapshot], SnapshotHeld | None]


def weights(seed: int, near: list[Tensor] | None = None) -> list[Tensor]:
    """Random weights; `near`: those, with a few of them moved."""
    generator = torch.Generator().manual_seed(seed)
    if near is None:
        return [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in SHAPES]
    moved = [t.clone() for t in near]
    moved[0][seed % 64] += 1
    return moved


def capture(version: int, tensors: list[Tensor]) -> Capture:
    return Capture(version, 20 * (version - 1), 17, 0, 1, tensors)


class Anchor:
    """One stage's side of the anchor; `fate` decides what becomes of a part: True, it arrives."""

    def __init__(self, out: Path) -> None:
        self.store = ReplayStore(out, [SHAPES], torch.bfloat16)
        self.parts: list[Snapshot] = []
        self.shipper = SnapshotShipper(self.post, 50)
        self.fate: Callable[[int], bool] = lambda n: True

    def post(self, kind: FrameKind, message: Snapshot | Slice, tick: int) -> None:
        assert kind is FrameKind.SNAPSHOT and isinstance(message, Snapshot)
        self.parts.append(message)
        if self.fate(len(self.parts)):
            asyncio.get_running_loop().call_soon(self.arrive, message)

    def arrive(self, message: Snapshot) -> None:
        try:
            held = self.store.part(0, message)
            whole = held == message.total_bytes
            if whole:
                self.store.place(0, self.store.decode(0))
            self.shipper.held(SnapshotHeld(message.version, held, whole))
        except SnapshotRefused as error:
            self.shipper.held(SnapshotHeld(message.version, refused=str(error)))

    async def arrived(self, version: int) -> None:
        """Wait until the anchor holds it whole."""
        async with asyncio.timeout(10):
            while self.store.base(0)[0] != version:
                await asyncio.sleep(0.001)

    async def ship(self, *captures: Capture, to: Path | None = None) -> None:
        """Offer them one after the other, each once the one before has arrived whole; after the first one the anchor
        is restarted on the volume `to`."""
        running = asyncio.create_task(self.shipper.run())
        for one in captures:
            self.shipper.offer(one)
            await self.arrived(one.version)
            await asyncio.sleep(0.01)
            if to is not None and one is captures[0]:
                self.store = ReplayStore(to, [SHAPES], torch.bfloat16)
        running.cancel()


@pytest.fixture
def anchor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Anchor:
    monkeypatch.setattr(snapshots, "PART_BYTES", 1000)  # several parts of these small weights
    return Anchor(tmp_path)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x.view(torch.int16), y.view(torch.int16)) for x, y in zip(a, b, strict=True))


def test_versions_arrive_bit_for_bit_and_later_ones_as_deltas(anchor: Anchor) -> None:
    first = weights(0)
    second, third = weights(1, first), weights(2, weights(1, first))
    asyncio.run(anchor.ship(capture(1, first), capture(2, second), capture(3, third)))
    for version, tensors in ((1, first), (2, second), (3, third)):
        assert same(anchor.store.weights(version, 0), tensors)
    sizes = {m.version: (m.base, m.total_bytes) for m in anchor.parts}
    assert [sizes[v][0] for v in (1, 2, 3)] == [0, 1, 2]
    assert sizes[2][1] < sizes[1][1] / 10 > sizes[3][1]


def test_a_broken_stream_goes_on_where_it_broke(anchor: Anchor) -> None:
    async def run() -> None:
        anchor.fate = lambda n: n <= 3
        running = asyncio.create_task(anchor.shipper.run())
        anchor.shipper.offer(capture(1, weights(0)))
        while len(anchor.parts) < 7:  # three arrived; four more are in flight, and lost
            await asyncio.sleep(0.001)
        anchor.fate = lambda n: True
        anchor.shipper.resume()
        await anchor.arrived(1)
        running.cancel()

    asyncio.run(run())
    assert [m.offset for m in anchor.parts[7:]] == list(range(3000, anchor.parts[0].total_bytes, 1000))
    assert same(anchor.store.weights(1, 0), weights(0))


def test_an_anchor_without_what_it_had_is_sent_everything_again(anchor: Anchor, tmp_path: Path) -> None:
    first = weights(0)
    two = capture(1, first), capture(2, weights(1, first))
    asyncio.run(anchor.ship(*two, to=tmp_path / "another"))
    assert [m.base for m in anchor.parts if m.version == 2 and m.offset == 0] == [1, 0]
    assert same(anchor.store.weights(2, 0), weights(1, first))


def test_a_restarted_anchor_goes_on_from_its_volume(anchor: Anchor, tmp_path: Path) -> None:
    first = weights(0)
    asyncio.run(anchor.ship(capture(1, first), capture(2, weights(1, first)), to=tmp_path))
    assert {m.base for m in anchor.parts if m.version == 2} == {1}
    assert [version for version, _, _ in anchor.store.pairs()] == [1, 2]


@pytest.mark.parametrize(("offered", "next_"), [([1, 2], 2), ([2, 3], 2), ([2, 3, 4], 4), ([5, 6, 7], 6), ([1, 3], 3)])
def test_stages_that_fall_behind_pass_over_the_same_versions(anchor: Anchor, offered: list[int], next_: int) -> None:
    for version in offered:
        anchor.shipper.offer(capture(version, weights(version)))
    assert anchor.shipper._waiting is not None and anchor.shipper._waiting.version == next_


def test_an_anchor_restarted_in_the_middle_of_a_short_packet_gets_all_of_it(
    anchor: Anchor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "PART_BYTES", 4200)  # all parts fit into what may be in flight

    async def run() -> None:
        anchor.fate = lambda n: n == 1
        running = asyncio.create_task(anchor.shipper.run())
        anchor.shipper.offer(capture(1, weights(0)))
        while len(anchor.parts) < 3 or not anchor.shipper._now or not anchor.shipper._now.held:  # one is acknowledged
            await asyncio.sleep(0.001)
        anchor.store = ReplayStore(tmp_path / "another", [SHAPES], torch.bfloat16)
        anchor.fate = lambda n: True
        anchor.shipper.resume()
        await anchor.arrived(1)
        running.cancel()

    asyncio.run(run())
    assert same(anchor.store.weights(1, 0), weights(0))


# What the store refuses ------------------------------------------------------------------------------------------------


def parts_of(anchor: Anchor, tensors: list[Tensor]) -> list[Snapshot]:
    """The parts of version 1, taken off the wire."""
    anchor.fate = lambda n: False

    async def run() -> None:
        running = asyncio.create_task(anchor.shipper.run())
        anchor.shipper.offer(capture(1, tensors))
        while not anchor.parts:
            await asyncio.sleep(0.001)
        running.cancel()

    asyncio.run(run())
    one = anchor.parts[0]
    anchor.shipper.held(SnapshotHeld(1, one.total_bytes))
    packet = anchor.shipper._now.packet  # type: ignore[union-attr]
    return [
        Snapshot(**{**vars(one), "offset": at, "part": packet[at : at + 1000]}) for at in range(0, len(packet), 1000)
    ]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"total_bytes": 1 << 40}, "at most"),
        ({"total_bytes": 0}, "at most"),
        ({"offset": 80000}, "at 80000"),
        ({"part": b""}, "0 bytes"),
        ({"digest": b"x" * 16}, "digest"),
        ({"base": 5}, "delta against version 5"),
    ],
)
def test_a_bad_part_is_refused_in_words(anchor: Anchor, change: dict[str, object], word: str) -> None:
    parts = [Snapshot(**{**vars(part), **change}) for part in parts_of(anchor, weights(0))]
    with pytest.raises(SnapshotRefused, match=word):
        for part in parts[:1] if "offset" in change or "part" in change else parts:
            if anchor.store.part(0, part) == part.total_bytes:
                anchor.store.decode(0)
    assert anchor.store.base(0)[0] == 0


def test_a_damaged_packet_and_weights_that_are_not_finite_are_refused(anchor: Anchor) -> None:
    parts = parts_of(anchor, weights(0))
    parts[1].part = bytes([parts[1].part[0] ^ 1]) + parts[1].part[1:]
    for part in parts:
        anchor.store.part(0, part)
    with pytest.raises(SnapshotRefused, match="damaged"):
        anchor.store.decode(0)


def test_weights_that_are_not_finite_are_refused(anchor: Anchor) -> None:
    poisoned = weights(0)
    poisoned[1][3] = float("nan")
    for part in parts_of(anchor, poisoned):
        anchor.store.part(0, part)
    with pytest.raises(SnapshotRefused, match="not finite"):
        anchor.store.decode(0)


def test_parts_out_of_order_are_not_taken(anchor: Anchor) -> None:
    parts = parts_of(anchor, weights(0))
    assert anchor.store.part(0, parts[2]) == 0
    assert anchor.store.part(0, parts[0]) == 1000
    assert anchor.store.part(0, parts[0]) == 1000
    assert anchor.store.part(0, parts[2]) == 1000
    assert anchor.store.part(0, parts[1]) == 2000
