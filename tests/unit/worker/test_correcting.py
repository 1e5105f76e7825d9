"""A stage's corrections by themselves: what is held, refused and forgotten, and that a checkpoint keeps all of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from codec.corrections import CorrectionEncoder
from swarm_core.config import load
from swarm_core.manifest import Manifest, make_manifest
from swarm_core.models.architecture import read_shape
from swarm_core.wire.corrections import correction_spec, digest_of
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import Correction
from swarm_worker.correcting import Correcting, CorrectionRefused
from swarm_worker.schedule import Stamp

TINY = Path(__file__).parents[3] / "examples" / "tiny"
SHAPES = [(6, 8), (8,)]
CADENCE, LINEAGE = 4, 77


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    overrides = {"corrections.merger": "held_delta", "anchor.m_cadence": str(CADENCE), "corrections.k_max": "9"}
    return make_manifest(load(TINY / "run.toml", overrides), read_shape(TINY / "model"), "a0" * 32)


class Stage:
    """A middle stage's parameters, and ticks of random gradients."""

    def __init__(self, manifest: Manifest) -> None:
        self.parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        self.correcting = Correcting(manifest, 1, self.parameters, [10, None])
        self.encoder = CorrectionEncoder(correction_spec(manifest.config), SHAPES)

    def snapshot(self, tick: int) -> None:
        assert self.correcting.capture(Stamp(tick=tick, lineage=LINEAGE), None) is not None  # type: ignore[arg-type]

    def correction(self, version: int, **changes: Any) -> Correction:
        generator = torch.Generator().manual_seed(version)
        packet = self.encoder.encode([torch.randn(shape, generator=generator) for shape in SHAPES])
        tick = CADENCE * (version - 1)
        made = Correction(version, tick, tick + 1, tick + 1, LINEAGE, packet, digest_of(packet))
        return replace(made, **changes)

    def tick(self, tick: int, correction: int, *, committed: bool = True) -> list[Tensor]:
        """The merged gradients of a tick; those before are a function of the tick alone."""
        generator = torch.Generator().manual_seed(1000 + tick)
        for p in self.parameters:
            p.grad = torch.randn(p.shape, generator=generator) * (1 + tick % 3)
        stamp = Stamp(tick=tick, correction=correction)
        self.correcting.merge(stamp)
        self.correcting.settle(stamp, committed=committed)
        return [p.grad.clone() for p in self.parameters if p.grad is not None]


@pytest.fixture
def stage(manifest: Manifest) -> Stage:
    made = Stage(manifest)
    for tick in (0, 4, 8):
        made.snapshot(tick)
    return made


def test_a_sound_correction_is_held_and_merged(stage: Stage) -> None:
    sound = stage.correction(2)
    stage.correcting.check(sound)
    stage.correcting.hold(sound)
    assert stage.correcting.held == {2: (4, 5)}
    plain = stage.tick(5, 0)
    assert not any(torch.equal(a, b) for a, b in zip(plain, stage.tick(5, 2), strict=True))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"version": 0}, "took none"),
        ({"version": 3}, "took it in tick 8"),
        ({"version": 5, "tick": 16, "born": 17, "not_before": 17}, "took none"),
        ({"lineage": 78}, "took it in tick 4 on history"),
        ({"born": 3}, "before it"),
        ({"not_before": 3}, "before it"),
        ({"packet": b""}, "digest"),
        ({"digest": b"y" * 16}, "digest"),
    ],
)
def test_what_does_not_belong_here_is_refused_in_words(stage: Stage, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(CorrectionRefused, match=word):
        stage.correcting.check(replace(stage.correction(2), **changes))


@pytest.mark.parametrize("shapes", [[(6, 8), (9,)], [(6, 8)], [(8, 6), (8,)]])
def test_another_shape_is_refused(stage: Stage, shapes: list[tuple[int, ...]], manifest: Manifest) -> None:
    spec = correction_spec(manifest.config)
    packet = CorrectionEncoder(spec, shapes).encode([torch.ones(shape) for shape in shapes])
    with pytest.raises(CorrectionRefused):
        stage.correcting.check(stage.correction(2, packet=packet, digest=digest_of(packet)))


def test_a_tick_that_is_to_merge_what_is_not_here_fails(stage: Stage) -> None:
    with pytest.raises(BadFrame, match="is to merge correction 2; this stage holds"):
        stage.tick(5, 2)


def test_what_is_too_old_or_overtaken_goes(stage: Stage) -> None:
    for version in (1, 2, 3):
        stage.correcting.hold(stage.correction(version))
    stage.tick(6, 0)
    assert set(stage.correcting.held) == {1, 2, 3}
    stage.tick(7, 2)
    assert set(stage.correcting.held) == {2, 3}  # never back to an older one
    stage.tick(13, 0)
    assert set(stage.correcting.held) == {3}  # in tick 14 version 2 is 10 ticks old


def test_a_checkpoint_keeps_packets_and_what_the_merger_remembers(stage: Stage, manifest: Manifest) -> None:
    for version in (1, 2):
        stage.correcting.hold(stage.correction(version))
    stage.tick(5, 1)
    tensors, metadata = stage.correcting.state()
    metadata = json.loads(json.dumps(metadata))
    ahead = [stage.tick(t, 1 + (t > 6)) for t in (6, 7, 8)]

    again = Stage(manifest)
    again.correcting.load(tensors, metadata)
    assert again.correcting.held == {1: (0, 1), 2: (4, 5)}
    for t, wanted in zip((6, 7, 8), ahead, strict=True):
        for a, b in zip(again.tick(t, 1 + (t > 6)), wanted, strict=True):
            assert torch.equal(a, b)
    with pytest.raises(CorrectionRefused, match="took none"):  # of a future that the checkpoint does not know
        again.correcting.check(stage.correction(4, lineage=LINEAGE))


def test_the_lambda_of_a_skipped_tick_is_forgotten(stage: Stage, manifest: Manifest) -> None:
    other = Stage(manifest)
    for s in (stage, other):
        s.correcting.hold(stage.correction(1))
    stage.tick(2, 1, committed=False)
    for a, b in zip(stage.tick(3, 1), other.tick(3, 1), strict=True):
        assert torch.equal(a, b)


def test_a_snapshot_is_taken_once_when_it_is_due_or_in_the_next_committed_tick(stage: Stage) -> None:
    assert stage.correcting.capture(Stamp(tick=9), None) is None  # type: ignore[arg-type]
    with torch.no_grad():
        for p in stage.parameters:
            p.fill_(1 + 2**-9 + 2**-20)
    taken = stage.correcting.capture(Stamp(tick=14, lineage=5), None)  # type: ignore[arg-type]
    assert taken is not None and (taken.version, taken.tick, taken.lineage) == (4, 14, 5)  # 12 and 13 were skipped
    with torch.no_grad():
        for p in stage.parameters:
            p.fill_(7)
    assert bool((taken.rounded()[0] == 1 + 2**-9).all()), "rounded to 10 bits"
    assert bool((taken.rounded()[1] == 1 + 2**-9 + 2**-20).all()), "as it is"
    assert stage.correcting.capture(Stamp(tick=15), None) is None  # type: ignore[arg-type]


def test_what_is_too_old_or_too_large_is_refused_by_name(stage: Stage) -> None:
    stage.tick(13, 0)
    with pytest.raises(CorrectionRefused, match="older than k_max = 9"):
        stage.correcting.check(stage.correction(2))
    packet = stage.encoder.encode([torch.full(shape, 3e30) for shape in SHAPES])
    with pytest.raises(CorrectionRefused, match="wanted at most 1e"):
        stage.correcting.check(stage.correction(3, packet=packet, digest=digest_of(packet)))
