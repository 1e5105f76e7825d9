"""Checkpoint folders: complete or passed over, pruned from the old end, and refused for another manifest."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from anchor_node import checkpoints
from anchor_node.checkpoints import (
    BASES,
    INDEX,
    MARKER,
    CheckpointError,
    complete,
    found,
    latest,
    load_bases,
    resumable,
    set_later_aside,
)
from codec.spec import Direction
from swarm_core.config import load
from swarm_core.manifest import Manifest, make_manifest
from swarm_core.models.architecture import read_shape
from swarm_core.wire.bases import matrix_of
from swarm_core.wire.messages import BasisSet, Saved

TINY = Path(__file__).parents[3] / "examples" / "tiny"
DIGEST = "ab" * 32
BASIS = BasisSet(4, 9, [matrix_of((0, Direction.FORWARD), torch.eye(5)[:, :2], step=0.5)])


def shards(out: Path, tick: int) -> tuple[str, dict[int, Saved]]:
    """Two stages write their part."""
    name = f"tick-{tick:08d}"
    folder = out / "checkpoints" / name
    folder.mkdir(parents=True)
    saved = {}
    for stage in (1, 0):
        (folder / f"stage-{stage}").write_text(f"{tick} {stage}")
        saved[stage] = Saved(tick, name, f"stage-{stage}", f"{stage}" * 64, 3)
    return name, saved


def made(out: Path, tick: int, keep: int = 2, digest: str = DIGEST) -> checkpoints.Checkpoint:
    name, saved = shards(out, tick)
    return complete(out, name, digest, saved, keep, BASIS)


def test_a_complete_checkpoint_is_found_again(tmp_path: Path) -> None:
    checkpoint = made(tmp_path, 12)
    assert checkpoint == latest(tmp_path)
    assert (checkpoint.tick, checkpoint.name, checkpoint.manifest_digest) == (12, "tick-00000012", DIGEST)
    assert checkpoint.shards == {i: Saved(12, "tick-00000012", f"stage-{i}", f"{i}" * 64, 3) for i in (0, 1)}
    assert load_bases(checkpoint) == BASIS


def test_the_marker_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of the writes are done when the machine stops, the checkpoint is whole or passed over."""
    made(tmp_path, 1)
    name, saved = shards(tmp_path, 2)
    folder = tmp_path / "checkpoints" / name
    for survived in range(20):
        left = survived

        def fsync(descriptor: int) -> None:
            nonlocal left
            if left == 0:
                raise OSError("no power")
            left -= 1

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            complete(tmp_path, name, DIGEST, saved, 2, BASIS)
        except OSError:
            whole = (folder / MARKER).exists()
            assert latest(tmp_path).tick == (2 if whole else 1)
            if whole:  # then everything that it vouches for is there
                assert latest(tmp_path).shards == saved and load_bases(latest(tmp_path)).version == 4
            (folder / MARKER).unlink(missing_ok=True)
        else:
            assert survived >= 2 and latest(tmp_path).tick == 2
            return
    raise AssertionError("never complete")


@pytest.mark.parametrize(
    "damage",
    ["no marker", "no index", "empty index", "torn index", "another index", "a list", "shards without names"],
)
def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    made(tmp_path, 1)
    folder = made(tmp_path, 2).folder
    text = (folder / INDEX).read_text()
    match damage:
        case "no marker":
            (folder / MARKER).unlink()
        case "no index":
            (folder / INDEX).unlink()
        case "empty index":
            (folder / INDEX).write_text("")
        case "torn index":
            (folder / INDEX).write_text(text[: len(text) // 2])
        case "another index":
            (folder / INDEX).write_text("{}")
        case "a list":
            (folder / INDEX).write_text("[]")
        case "shards without names":
            (folder / INDEX).write_text(text.replace('"file"', '"gone"'))
    assert [c.tick for c in found(tmp_path)] == [1]
    assert latest(tmp_path).tick == 1


def test_pruning_keeps_the_newest_and_touches_nothing_unfinished(tmp_path: Path) -> None:
    unfinished, _ = shards(tmp_path, 3)
    for tick in (2, 9, 10, 100):
        made(tmp_path, tick, keep=2)
    assert [c.tick for c in found(tmp_path)] == [10, 100]
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == [
        unfinished,
        "tick-00000010",
        "tick-00000100",
    ]


@pytest.mark.parametrize(("keep", "left"), [(1, [3]), (3, [1, 2, 3]), (9, [1, 2, 3]), (0, [1, 2, 3])])
def test_how_many_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    for tick in (1, 2, 3):
        made(tmp_path, tick, keep=keep)
    assert [c.tick for c in found(tmp_path)] == left


def test_a_checkpoint_that_is_half_deleted_is_not_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, 1)

    def crash(folder: Path) -> None:
        raise OSError("no power")

    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(OSError, match="no power"):
        made(tmp_path, 2, keep=1)
    assert [c.tick for c in found(tmp_path)] == [2]


def test_none_is_said_with_the_place_and_a_consequence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no complete checkpoint below {tmp_path / 'checkpoints'}: nothing to"):
        latest(tmp_path)


def manifest(**overrides: str) -> Manifest:
    config = load(TINY / "run.toml", overrides)
    return make_manifest(config, read_shape(TINY / "model"), "f" * 64)


def told(out: Path, manifest: Manifest) -> None:
    (out / "manifest.json").write_text(json.dumps({**json.loads(manifest.to_json()), "digest": manifest.digest()}))


def test_a_changed_knob_is_named_with_both_values(tmp_path: Path) -> None:
    old = manifest()
    checkpoint = made(tmp_path, 3, digest=old.digest())
    told(tmp_path, old)
    free = {"run.ticks": "999", "sampler.eval_every": "7", "checkpoint.keep": "5", "run.threads": "2"}
    assert resumable(tmp_path, manifest(**free)) == checkpoint
    changed = manifest(**free, **{"grpo.max_reuse": "1", "links.rank_forward": "0.4", "optimizer.schedule": "linear"})
    with pytest.raises(CheckpointError) as caught:
        resumable(tmp_path, changed)
    text = str(caught.value)
    assert "tick-00000003" in text and "\n" not in text
    for words in ("grpo.max_reuse 4 -> 1", "links.rank_forward 0.5 -> 0.4", "run.ticks 160 -> 999"):
        assert words in text
    assert "eval_every" not in text and "threads 1" not in text


def test_without_the_old_manifest_both_digests_are_told(tmp_path: Path) -> None:
    made(tmp_path, 3)
    for text in (None, "{", json.dumps({"digest": "of a later run"})):
        if text is not None:
            (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"manifest abababababab\.\.\., now {manifest().digest()[:12]}"):
            resumable(tmp_path, manifest())


def test_a_run_goes_back_to_a_named_checkpoint_and_leaves_the_later_ones(tmp_path: Path) -> None:
    plan = manifest()
    for tick in (1, 2, 3):
        made(tmp_path, tick, keep=9, digest=plan.digest())
    assert resumable(tmp_path, plan).tick == 3
    for name in ("tick-00000002", f"{tmp_path}/checkpoints/tick-00000002", "tick-00000002/"):
        assert resumable(tmp_path, plan, name).tick == 2
    with pytest.raises(CheckpointError, match="tick-9 is no complete checkpoint; there are: tick-00000001, tick-"):
        resumable(tmp_path, plan, "tick-9")
    set_later_aside(tmp_path, 2)
    assert [c.tick for c in found(tmp_path)] == [1, 2]
    assert (tmp_path / "checkpoints" / "tick-00000003" / "stage-1").exists(), "set aside, not deleted"


@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_bases_that_cannot_be_read_are_one_line(tmp_path: Path, damage: str) -> None:
    checkpoint = made(tmp_path, 1)
    path = checkpoint.folder / BASES
    match damage:
        case "missing":
            path.unlink()
        case "torn":
            path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_bases(checkpoint)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
