"""Shards: whole or absent, bit for bit, and one readable line when they are not what was asked for."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from swarm_worker import shard as shard_file
from swarm_worker import shard as shards
from swarm_worker.shard import Shard, ShardError, ShardWriter, clone_all, read_shard, select, shard_name, write_shard

META = {"tick": 12, "lineage": 2**64 - 1, "lead": None, "gate": {"increments": [0.1, 1e-300]}, "word": "é"}


@pytest.fixture(autouse=True)
def _no_further_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few ticks are enough to see what is kept; that all of the last MOST_LOST stay has a test of its own."""
    monkeypatch.setattr(shard_file, "MOST_LOST", 0)


def example() -> Shard:
    generator = torch.Generator().manual_seed(5)
    tensors = {
        "model.layers.0.weight": torch.randn(4, 6, generator=generator).T,  # not contiguous
        "optimizer.a.exp_avg": torch.randn(3, generator=generator, dtype=torch.float64),
        "batch.0.ids_N": torch.arange(7),
        "batch.0.active_M": torch.tensor([True, False]),
        "bf16": torch.randn(2, 2, generator=generator).to(torch.bfloat16),
        "empty": torch.empty(0, 5),
        "scalar": torch.tensor(float("nan")),
        "grad": torch.ones(2, requires_grad=True),
    }
    return Shard(tensors, META)


def test_a_shard_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "tick-00000012" / shard_name(1, 3)
    digest, size = write_shard(path, example())
    assert (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size) == (digest, size)
    back = read_shard(path, digest)
    assert back.meta == META
    assert set(back.tensors) == set(example().tensors)
    for name, tensor in example().tensors.items():
        assert back.tensors[name].dtype == tensor.dtype and back.tensors[name].shape == tensor.shape
        assert torch.equal(back.tensors[name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name
    assert read_shard(path).meta == META  # without a digest too
    assert write_shard(path, example()) == (digest, size)  # equal states are equal bytes


def test_names_sort_by_stage() -> None:
    assert shard_name(2, 12) == "stage-02-of-12.safetensors"


def test_nothing_half_written_is_ever_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c" / shard_name(0, 1)
    digest, _ = write_shard(path, example())

    def crash(descriptor: int) -> None:
        assert path.exists()
        raise OSError("no power")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="no power"):
        write_shard(path, Shard({"other": torch.zeros(3)}, {}))
    monkeypatch.undo()
    assert read_shard(path, digest).meta == META
    assert write_shard(path, example())[0] == digest  # what the crash left does not stand in the way
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_missing_shard_says_where_it_must_lie(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no such shard; this stage's shard must lie below the worker's --out"):
        read_shard(tmp_path / "none.safetensors")


def test_a_shard_of_another_digest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    digest, _ = write_shard(path, example())
    with pytest.raises(ShardError, match=f"sha256 is {digest[:12]}.*the index says 000000000000.*damaged"):
        read_shard(path, "0" * 64)


@pytest.mark.parametrize("at", [0, 9, 60, -1])
def test_a_changed_bit_is_found(tmp_path: Path, at: int) -> None:
    path = tmp_path / "s.safetensors"
    digest, _ = write_shard(path, example())
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    with pytest.raises(ShardError, match="damaged"):
        read_shard(path, digest)


@pytest.mark.parametrize("damage", ["empty", "short", "cut", "noise", "no metadata", "metadata", "folder"])
def test_an_unreadable_file_is_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "s.safetensors"
    write_shard(path, example())
    data = path.read_bytes()
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "short":
            path.write_bytes(data[:5])
        case "cut":
            path.write_bytes(data[:-3])
        case "noise":
            path.write_bytes(bytes(range(256)))
        case "no metadata":
            shards.save_file({"a": torch.zeros(1)}, path)
        case "metadata":
            shards.save_file({"a": torch.zeros(1)}, path, metadata={"kedge": "{"})
        case "folder":
            path.unlink()
            path.mkdir()
    with pytest.raises(ShardError) as caught:
        read_shard(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def held(out: Path, stage: int = 0) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in out.glob(f"checkpoints/*/{shard_name(stage, 2)}"))


def writer(out: Path, stage: int = 0, keep: int = 2) -> ShardWriter:
    return ShardWriter(out, stage, 2, "ab", keep)


def small() -> Shard:
    return Shard({"w": torch.zeros(1)}, {})


def test_a_worker_keeps_one_shard_more_than_checkpoints(tmp_path: Path) -> None:
    """The newest is not complete before the others have written theirs: until then the ones before it must be there."""
    ours, other = writer(tmp_path), writer(tmp_path, stage=1, keep=0)
    for tick in (1, 2, 3, 4, 5):
        other.write(tick, small())
        ours.write(tick, small())
    assert held(tmp_path) == [3, 4, 5]
    assert held(tmp_path, 1) == [1, 2, 3, 4, 5], "another stage's are its own affair"
    alone = writer(tmp_path / "alone", keep=1)
    for tick in (1, 2, 3):
        alone.write(tick, small())
    assert sorted(p.name for p in (tmp_path / "alone" / "checkpoints").iterdir()) == ["tick-00000002", "tick-00000003"]


def test_a_worker_leaves_alone_what_the_anchor_prunes_and_what_a_resume_left(tmp_path: Path) -> None:
    ours = writer(tmp_path, keep=1)
    ours.write(1, small())
    (tmp_path / "checkpoints" / "tick-00000001" / "index.json").write_text("{}")
    writer(tmp_path, keep=1).write(90, small())  # of a future that the run resumed at 1 does not have
    for tick in (2, 3):
        ours.write(tick, small())
    assert held(tmp_path) == [1, 2, 3, 90]
    ours.write(4, small())
    assert held(tmp_path) == [1, 3, 4, 90]


def test_what_cannot_be_written_is_one_line_and_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        ShardError, match="cannot be written .*No space left.*: make room there, and start this stage"
    ) as told:
        writer(tmp_path).write(1, small())
    assert "tick-00000001" in str(told.value) and "\n" not in str(told.value)
    assert not list((tmp_path / "checkpoints" / "tick-00000001").iterdir())


def test_layers_for_transformers_come_and_go_with_their_shard(tmp_path: Path) -> None:
    subject = ShardWriter(tmp_path, 1, 2, "ab", 1, hf=True)
    for tick in (1, 2, 3):
        subject.write(tick, example())
    assert held(tmp_path, 1) == [2, 3]
    layers = sorted(str(path.relative_to(tmp_path / "checkpoints")) for path in tmp_path.glob("checkpoints/*/hf/*"))
    assert layers == [f"tick-0000000{tick}/hf/model-00002-of-00002.safetensors" for tick in (2, 3)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["tick-00000002", "tick-00000003"]
    with safe_open(tmp_path / "checkpoints" / layers[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert list(file.keys()) == ["model.layers.0.weight"], "nothing of the optimizer, or of a batch"
        assert torch.equal(file.get_tensor("model.layers.0.weight"), example().tensors["model.layers.0.weight"])


def test_select_takes_one_name_and_not_its_namesakes() -> None:
    tensors = {
        name: torch.zeros(1) for name in ("batch.1.ids_N", "batch.1.a.b", "batch.10.ids_N", "batch.1", "xbatch.1.c")
    }
    assert set(select(tensors, "batch.1")) == {"ids_N", "a.b"}


def test_clones_do_not_move_with_training() -> None:
    weight = torch.ones(2, requires_grad=True)
    clone = clone_all({"w": weight})["w"]
    with torch.no_grad():
        weight += 1
    assert clone.tolist() == [1, 1] and not clone.requires_grad


def test_shards_reach_as_far_back_as_the_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With checkpoints every two ticks, of which one is kept; every ten ticks it is as if nothing reached back."""
    monkeypatch.setattr(shard_file, "MOST_LOST", 10)
    ours, rare = writer(tmp_path, keep=1), writer(tmp_path / "rare", keep=1)
    for tick in range(2, 31, 2):
        ours.write(tick, small())
    for tick in range(10, 51, 10):
        rare.write(tick, small())
    assert held(tmp_path) == [20, 22, 24, 26, 28, 30]
    assert held(tmp_path / "rare") == [40, 50]
