"""Checkpoint folders: complete or passed over, pruned from the old end, and refused for another manifest."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from anchor_node import checkpoints
from anchor_node.checkpoints import BASES, INDEX, MARKER, CheckpointError, complete, found, latest, load_bases
from codec.spec import Direction
from swarm_core.wire.messages import Saved

DIGEST = "ab" * 32
BASIS = (4, {(0, Direction.FORWARD): torch.eye(5)[:, :2], (1, Direction.BACKWARD): torch.eye(5)[:, 1:4]})


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
    assert checkpoint == latest(tmp_path, DIGEST) == latest(tmp_path)
    assert (checkpoint.tick, checkpoint.name, checkpoint.manifest_digest) == (12, "tick-00000012", DIGEST)
    assert checkpoint.shards == {i: Saved(12, "tick-00000012", f"stage-{i}", f"{i}" * 64, 3) for i in (0, 1)}
    version, bases = load_bases(checkpoint)
    assert version == 4 and set(bases) == set(BASIS[1])
    assert all(torch.equal(bases[key], q) for key, q in BASIS[1].items())


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
                assert latest(tmp_path).shards == saved and load_bases(latest(tmp_path))[0] == 4
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
    assert latest(tmp_path, DIGEST).tick == 1


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


def test_another_manifest_is_refused_with_both_digests(tmp_path: Path) -> None:
    made(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"tick-00000003 was written .* abababababab\.\.\., this .* cdcdcdcdcdcd"):
        latest(tmp_path, "cd" * 32)
    assert latest(tmp_path, None).tick == 3


@pytest.mark.parametrize("damage", ["missing", "torn", "a name"])
def test_bases_that_cannot_be_read_are_one_line(tmp_path: Path, damage: str) -> None:
    checkpoint = made(tmp_path, 1)
    path = checkpoint.folder / BASES
    match damage:
        case "missing":
            path.unlink()
        case "torn":
            path.write_bytes(path.read_bytes()[:-4])
        case "a name":
            checkpoints.save_file({"0.7.1": torch.zeros(1)}, path, metadata={"version": "1"})
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_bases(checkpoint)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
