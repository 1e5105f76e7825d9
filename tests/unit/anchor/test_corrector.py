"""The provider of corrections by itself: a small model's pairs in, corrections out; restarts, rollbacks, bad input."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anchor_node.corrector import Corrector
from anchor_node.replay_store import ReplayStore
from codec import weight_delta
from codec.corrections import decode
from swarm_core.config import load
from swarm_core.learning.batch import Batch, make_batch
from swarm_core.learning.microbatch import Sample
from swarm_core.manifest import Manifest, make_manifest
from swarm_core.models.architecture import read_shape
from swarm_core.models.reading import load_stage
from swarm_core.wire.corrections import correction_spec, digest_of, slice_message
from swarm_core.wire.frames import Header
from swarm_core.wire.messages import Correction, FrameKind, Slice, Snapshot, SnapshotHeld

TINY = Path(__file__).parents[3] / "examples" / "tiny"
OVERRIDES = {
    "swarm.stages": "2", "links.kind": "none", "corrections.merger": "held_delta", "corrections.form": "bf16",
    "anchor.m_cadence": "10", "anchor.snapshot": "exact",
}  # fmt: skip
EPOCH = 3


@dataclass
class Rig:
    """A corrector with what it sent and said."""

    out: Path
    overrides: dict[str, str] = field(default_factory=dict)
    now: int = 0
    sent: list[tuple[int, Correction]] = field(default_factory=list)
    events: list[tuple[str, str]] = field(default_factory=list)

    running: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        config = load(TINY / "run.toml", OVERRIDES | self.overrides)
        self.manifest: Manifest = make_manifest(config, read_shape(TINY / "model"), "a0" * 32)
        self.weights: list[list[Tensor]] = [
            list(load_stage(TINY / "model", span).values()) for span in self.manifest.spans
        ]
        self.corrector = self.again()

    def again(self) -> Corrector:
        """A corrector on the same volume, as after a restart."""
        if self.running is not None:
            self.running.cancel()
            self.running = None
        fires = self.manifest.fires()
        assert fires is not None
        self.corrector = Corrector(
            self.manifest,
            TINY / "model",
            self.out,
            torch.device("cpu"),
            fires,
            send=lambda stage, correction: self.sent.append((stage, correction)),
            event=lambda name, text, _numbers: self.events.append((name, text)),
            now=lambda: self.now,
            bases=lambda _version: None,
        )
        return self.corrector

    def batch(self) -> Batch:
        generator = torch.Generator().manual_seed(5)

        def ids(n: int) -> Tensor:
            return torch.randint(3, 18, (n,), generator=generator)

        samples = [Sample(ids(4), c := ids(3), (-1.0) ** i, torch.full((len(c),), -1.0)) for i in range(6)]
        batch = make_batch(0, 0, [samples], [18], [6], 4)
        batch.old_logprobs_M = torch.full((18,), -1.0)
        return batch

    def snapshot(self, stage: int, version: int, tick: int, lineage: int = 9) -> Snapshot:
        packet = weight_delta.encode(self.weights[stage], None)
        return Snapshot(version, tick, lineage, 0, len(packet), 0, packet, digest_of(packet))

    def slices(self, version: int, tick: int, lineage: int = 9) -> tuple[Slice, Slice]:
        batch = self.batch()
        both = (
            slice_message(batch.only(0), None, self.manifest.vocab),
            slice_message(None, batch.only(0), self.manifest.vocab),
        )
        for message in both:
            message.version, message.tick, message.lineage = version, tick, lineage
        return both

    async def feed(self, version: int, tick: int, lineage: int = 9) -> list[SnapshotHeld]:
        """A whole pair."""
        first, last = self.slices(version, tick, lineage)
        self.corrector.take_slice(0, header(), EPOCH, first)
        self.corrector.take_slice(1, header(), EPOCH, last)
        return [
            await self.corrector.take_snapshot(stage, header(), EPOCH, self.snapshot(stage, version, tick, lineage))
            for stage in (0, 1)
        ]

    async def until(self, holds: Callable[[], bool]) -> None:
        if self.running is None:
            self.running = asyncio.create_task(self.corrector.run())
        async with asyncio.timeout(60):
            while not holds() and not self.running.done():
                await asyncio.sleep(0.01)
        assert holds()

    def held(self, stage: int) -> int:
        """The newest version of a stage's weights that is whole on the volume."""
        return ReplayStore(self.out, [], torch.float32).base(stage)[0]

    def refused(self) -> list[str]:
        return [text for name, text in self.events if name == "snapshot_refused"]


def header(epoch: int = EPOCH) -> Header:
    return Header(FrameKind.SNAPSHOT, epoch=epoch)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_a_whole_pair_becomes_a_correction_for_every_stage(rig: Rig) -> None:
    async def run() -> None:
        rig.now = 13
        held = await rig.feed(2, 11)
        assert all(h.whole and not h.refused for h in held)
        await rig.until(lambda: len(rig.sent) == 2)

    asyncio.run(run())
    assert [stage for stage, _ in rig.sent] == [0, 1]
    for stage, c in rig.sent:
        assert (c.version, c.tick, c.born, c.not_before, c.lineage) == (2, 11, 13, 12, 9)
        assert c.digest == digest_of(c.packet) and rig.corrector.pending(stage) == [c]
        tensors = decode(c.packet, correction_spec(rig.manifest.config), [tuple(t.shape) for t in rig.weights[stage]])
        assert all(bool(torch.isfinite(t).all()) for t in tensors)
    assert any(float(t.abs().max()) > 0 for t in tensors), "bf16 links lose something, so delta is not 0"
    assert [name for name, _ in rig.events] == ["correction"]


def test_a_snapshot_whose_answer_was_lost_is_not_taken_twice(rig: Rig) -> None:
    async def run() -> None:
        first = await rig.corrector.take_snapshot(0, header(), EPOCH, rig.snapshot(0, 1, 0))
        again = await rig.corrector.take_snapshot(0, header(), EPOCH, rig.snapshot(0, 1, 0))
        assert first == again and again.whole
        rig.again()
        assert (await rig.corrector.take_snapshot(0, header(), EPOCH, rig.snapshot(0, 1, 0))).whole

    asyncio.run(run())
    assert not rig.refused() and not list(rig.out.glob("replay/incoming/*"))


def test_latency_is_a_floor(tmp_path: Path) -> None:
    rig = Rig(tmp_path, {"anchor.latency": "fixed", "anchor.delay_k": "7"})

    async def run() -> None:
        await rig.feed(2, 14)  # due at 13, taken at 14: skipped ticks are not replayed
        await rig.until(lambda: len(rig.sent) == 2)

    asyncio.run(run())
    assert {c.not_before for _, c in rig.sent} == {21}


def test_a_restarted_anchor_carries_on_from_its_volume(rig: Rig) -> None:
    async def run() -> None:
        await rig.feed(1, 0)
        await rig.until(lambda: len(rig.sent) == 2)
        first, last = rig.slices(2, 10)
        rig.corrector.take_slice(0, header(), EPOCH, first)
        rig.corrector.take_slice(1, header(), EPOCH, last)
        await rig.corrector.take_snapshot(0, header(), EPOCH, rig.snapshot(0, 2, 10))
        made = [rig.corrector.pending(stage) for stage in (0, 1)]

        rig.again().take_up(None)
        assert [rig.corrector.pending(stage) for stage in (0, 1)] == made
        assert [rig.held(stage) for stage in (0, 1)] == [2, 1]
        await rig.corrector.take_snapshot(1, header(), EPOCH, rig.snapshot(1, 2, 10))  # the one that was missing
        await rig.until(lambda: len(rig.sent) == 4)

    asyncio.run(run())
    assert [c.version for _, c in rig.sent] == [1, 1, 2, 2], "what was made is not made again"


def test_a_rollback_forgets_the_future_and_nothing_else(rig: Rig) -> None:
    async def run() -> None:
        rig.now = 1
        await rig.feed(1, 0)
        await rig.until(lambda: len(rig.sent) == 2)
        await rig.feed(2, 10)
        pairs = ReplayStore(rig.out, [], torch.float32).pairs
        assert {version for version, _, _ in pairs()} == {2}  # the first was replayed, and its time has passed

        rig.again().take_up(5)
        assert [c.version for c in rig.corrector.pending(0)] == [1]
        assert not pairs() and rig.held(0) == 0
        rig.again().take_up(0)
        assert rig.corrector.pending(0) == []

    asyncio.run(run())


@pytest.mark.parametrize(
    ("changes", "epoch", "word"),
    [
        ({}, EPOCH - 1, "epoch 2"),
        ({"tick": 10}, EPOCH, "tick 10"),
        ({"version": 0}, EPOCH, "tick 0"),
        ({"total_bytes": 1 << 50}, EPOCH, "at most"),
        ({"digest": b"?" * 16}, EPOCH, "digest"),
        ({"base": 4}, EPOCH, "delta against version 4"),
        ({"part": b"\0" * 64, "total_bytes": 64, "digest": digest_of(b"\0" * 64)}, EPOCH, "packet"),
    ],
)
def test_a_bad_snapshot_is_refused_in_words(rig: Rig, changes: dict[str, Any], epoch: int, word: str) -> None:
    message = replace(rig.snapshot(0, 1, 0), **changes)
    answer = asyncio.run(rig.corrector.take_snapshot(0, header(epoch), EPOCH, message))
    assert word in answer.refused and not answer.whole and word in rig.refused()[0]
    assert rig.held(0) == 0


def test_snapshots_of_another_shape_or_that_are_not_finite_are_refused(rig: Rig) -> None:
    async def run() -> None:
        other = await rig.corrector.take_snapshot(0, header(), EPOCH, rig.snapshot(1, 1, 0))
        rig.weights[1] = [t.clone() for t in rig.weights[1]]
        rig.weights[1][0].view(-1)[3] = float("inf")
        poisoned = await rig.corrector.take_snapshot(1, header(), EPOCH, rig.snapshot(1, 1, 0))
        assert "38, wanted 37 tensors" in other.refused and "not finite" in poisoned.refused

    asyncio.run(run())


def test_slices_are_taken_only_from_whom_they_come(rig: Rig) -> None:
    first, last = rig.slices(1, 0)
    rig.corrector.take_slice(1, header(), EPOCH, first)
    rig.corrector.take_slice(0, header(), EPOCH, last)
    rig.corrector.take_slice(0, header(EPOCH - 1), EPOCH, first)
    first.prompt_ids = first.prompt_ids[:-1]
    rig.corrector.take_slice(0, header(), EPOCH, first)
    assert len(rig.refused()) == 4 and not ReplayStore(rig.out, [], torch.float32).pairs()


def test_a_pair_that_cannot_be_replayed_costs_itself_alone(rig: Rig) -> None:
    async def run() -> None:
        first, last = rig.slices(1, 0)
        last.old_logprobs = b""
        rig.corrector.take_slice(0, header(), EPOCH, first)
        rig.corrector.take_slice(1, header(), EPOCH, last)
        for stage in (0, 1):
            await rig.corrector.take_snapshot(stage, header(), EPOCH, rig.snapshot(stage, 1, 0))
        await rig.until(lambda: any(name == "replay_failed" for name, _ in rig.events))
        await rig.feed(2, 10)
        await rig.until(lambda: len(rig.sent) == 2)

    asyncio.run(run())
    assert "old log-probs" in dict(rig.events)["replay_failed"]


def test_a_rollback_into_skipped_ticks_takes_the_snapshot_of_the_new_history(rig: Rig) -> None:
    """Due in tick 10, taken in 12 as 10 and 11 were skipped; the run starts again at 11 and takes it there: the number is
    the same, and nothing else."""

    async def run() -> None:
        rig.now = 13
        await rig.feed(2, 12)
        await rig.until(lambda: len(rig.sent) == 2)
        rig.again().take_up(11)
        rig.now = 11
        assert rig.corrector.pending(0) == [] and rig.held(0) == 0
        held = await rig.feed(2, 11, lineage=5)
        assert all(h.whole for h in held)
        await rig.until(lambda: len(rig.sent) == 4)

    asyncio.run(run())
    assert [(c.tick, c.lineage) for _, c in rig.sent] == [(12, 9), (12, 9), (11, 5), (11, 5)]


def test_parts_of_another_history_never_mix(rig: Rig) -> None:
    async def run() -> None:
        rig.now = 13
        first, last = rig.slices(2, 12)
        rig.corrector.take_slice(0, header(), EPOCH, first)
        rig.corrector.take_slice(1, header(), EPOCH, last)
        for stage in (0, 1):
            await rig.corrector.take_snapshot(stage, header(), EPOCH, rig.snapshot(stage, 2, 11, lineage=5))
        pairs = ReplayStore(rig.out, [], torch.float32).pairs()
        assert list(pairs) == [(2, 11, 5)] and set(pairs[(2, 11, 5)]) == {0, 1}

    asyncio.run(run())


def test_several_pending_corrections_survive_a_restart_and_none_is_made_twice(tmp_path: Path) -> None:
    rig = Rig(tmp_path, {"anchor.latency": "fixed", "anchor.delay_k": "20"})

    async def run() -> None:
        rig.now = 21
        for version in (1, 2, 3):  # none of them is due before tick 20
            await rig.feed(version, 10 * (version - 1))
        rig.now = 19
        await rig.until(lambda: len(rig.sent) == 6)
        pending = rig.corrector.pending(1)
        assert [c.version for c in pending] == [1, 2, 3]
        rig.again().take_up(None)
        assert rig.corrector.pending(1) == pending
        rig.again().take_up(15)
        assert [c.version for c in rig.corrector.pending(1)] == [1, 2]
        await rig.feed(3, 20, lineage=4)
        await rig.until(lambda: len(rig.sent) == 8)

    asyncio.run(run())
    assert [c.version for stage, c in rig.sent if stage == 0] in ([3, 2, 1, 3], [3, 1, 2, 3])


@pytest.mark.parametrize("broken", ["keep_slice", "place", "keep_made"])
def test_a_full_disk_costs_one_correction(rig: Rig, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    async def run() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(ReplayStore, broken, full)
            await rig.feed(1, 0)
            if broken == "keep_made":
                await rig.until(lambda: bool(rig.events))
        await rig.feed(2, 10)
        await rig.until(lambda: len(rig.sent) == 2)

    asyncio.run(run())
    assert {c.version for _, c in rig.sent} == {2}
    assert "No space left" in rig.events[0][1] and rig.events[0][0] in ("snapshot_refused", "replay_failed")


def test_with_bases_out_of_replays_no_pair_is_too_old_to_be_replayed(rig: Rig) -> None:
    """The bases do not mind an age at which a correction is of no use. `refresh` comes after the task has begun."""

    class Refresh:
        watched = 0

        def watch(self, *_: object) -> None:
            self.watched += 1

        def solve(self, _tick: int) -> dict[Any, Any]:
            return {}

    async def run() -> None:
        await rig.until(lambda: True)
        rig.corrector.refresh = refresh  # type: ignore[assignment]
        rig.now = 1000
        await rig.feed(1, 0)
        await rig.until(lambda: bool(rig.events))

    refresh = Refresh()
    asyncio.run(run())
    assert refresh.watched and [name for name, _ in rig.events] == ["correction"] and not rig.sent
