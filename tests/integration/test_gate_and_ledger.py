"""A rejected tick leaves no trace on any stage; and every byte that crosses a link is in the ledger."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from codec.spec import Direction, LinkSpec, dense_bytes, largest_packet_bytes, packet_bytes
from swarm_core.wire.frames import Assembler, message_bytes
from swarm_core.wire.rollouts import batch_data_bytes
from swarm_worker.link_ends import LinkEnd, Packet
from swarm_worker.schedule import Stamp
from swarm_worker.shard import read_shard, shard_name

Recipe = Any
Swarm = Callable[..., str]


def journal(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]


def learned(out: Path, tick: int, stage: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of one stage after `tick` ticks."""
    tensors = read_shard(out / "checkpoints" / f"tick-{tick:08d}" / shard_name(stage, 3)).tensors
    return {name: t for name, t in tensors.items() if not name.startswith(("batch.", "basis."))}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_gated_tick_changes_nothing_anywhere_and_ends_the_batch(
    recipe: Callable[..., Recipe], run_swarm: Swarm, tmp_path: Path
) -> None:
    run_file = recipe("qwen3", batches=12).run_file(
        run={"ticks": 24},
        dgg={"enabled": True, "window": 2, "tau": 0.0},
        grpo={"max_reuse": 4},
        checkpoint={"every": 1, "keep": 100},
    )
    out = tmp_path / "run"
    run_swarm(run_file, out)
    lines = journal(out)
    gated = [line for line in lines if line["reason"] == "gate"]
    assert gated, "a gate with no tolerance must reject something"
    assert all(line["pass"] > 1 for line in gated)
    for line in lines[1:]:
        before, after = line["tick"], line["tick"] + 1
        for stage in range(3):
            unchanged = same(learned(out, before, stage), learned(out, after, stage))
            assert unchanged == (line["outcome"] == "SKIP"), (line, stage)
    for line, following in pairwise(lines):
        if line["reason"] == "gate":
            assert following["batch"] == line["batch"] + 1, "the next batch is drawn"


def test_naive_reuse_and_single_use_stay_runnable(
    recipe: Callable[..., Recipe], run_swarm: Swarm, tmp_path: Path
) -> None:
    made = recipe("llama", batches=12)
    gate = {"enabled": False, "window": 2, "tau": 0.0}
    run_swarm(made.run_file(run={"ticks": 16}, dgg=gate, grpo={"max_reuse": 4}), tmp_path / "naive")
    assert [line["outcome"] for line in journal(tmp_path / "naive")] == ["COMMIT"] * 16
    run_swarm(made.run_file(run={"ticks": 16}, dgg={"enabled": True}, grpo={"max_reuse": 1}), tmp_path / "single")
    assert [line["pass"] for line in journal(tmp_path / "single")] == [1] * 16
    assert journal(tmp_path / "single")[-1]["batch"] == 7


def test_a_tensor_that_cannot_be_sent_skips_the_tick_everywhere(
    recipe: Callable[..., Recipe], run_swarm: Swarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from swarm_core.learning.stage import Stage

    plain = Stage.forward

    def poisoned(self: Stage, x: torch.Tensor, *, cache: Any = None) -> torch.Tensor:
        h = plain(self, x, cache=cache)
        calls[self.span.stage] += torch.is_grad_enabled()
        return h * float("nan") if self.span.stage == 1 and calls[1] == 4 and torch.is_grad_enabled() else h

    calls = [0, 0, 0]
    monkeypatch.setattr(Stage, "forward", poisoned)
    out = tmp_path / "run"
    run_swarm(recipe("llama").run_file(run={"ticks": 4}, checkpoint={"every": 1, "keep": 100}), out)
    lines = journal(out)
    bad = [line for line in lines if line["reason"] == "nonfinite"]
    assert len(bad) == 1 and bad[0]["outcome"] == "SKIP"
    following = lines[bad[0]["tick"] + 1]
    assert following["batch"] == bad[0]["batch"] + 1 and following["outcome"] == "COMMIT"
    for stage in range(3):
        assert same(learned(out, bad[0]["tick"], stage), learned(out, bad[0]["tick"] + 1, stage))


Sums = dict[tuple[int, str], list[int]]
COLUMNS = ("dense_bytes", "packet_bytes", "message_bytes", "frames")
UNROUNDED = {"quantiser_forward": "bf16", "quantiser_backward": "bf16", "outliers": 0.0}
RANKS = {"rank_forward": 6, "rank_backward": 11}


def expected_links(record: Path, lines: list[dict[str, Any]], spec: LinkSpec, share: bool, size: int = 8) -> Sums:
    """(tick, kind) -> COLUMNS of one link, from shapes alone; `share`: the rows of a prompt cross once a microbatch."""
    by_batch = defaultdict(list)
    for line in record.read_text().splitlines():
        by_batch[json.loads(line)["batch"]].append(json.loads(line))
    sums: Sums = defaultdict(lambda: [0, 0, 0, 0])

    def add(tick: int, kind: str, rows: tuple[int, int], direction: Direction) -> None:
        packet = packet_bytes(spec, direction, rows[1])
        for i, value in enumerate((dense_bytes(spec.width, rows[0]), packet, message_bytes(packet), 1)):
            sums[(tick, kind)][i] += value

    def length(c: dict[str, Any]) -> int:
        return len(c["prompt_ids"]) + len(c["completion_ids"])

    def microbatches(batch: int, half: int) -> list[tuple[int, int]]:
        """(all rows, rows that cross) of each."""
        groups = [by_batch[batch][i : i + 4] for i in range(half * 16, half * 16 + 16, 4)]
        groups = [g for g in groups if len({c["reward"] for c in g}) > 1]
        if share:
            kept = [c for g in sorted(groups, key=lambda g: max(map(length, g))) for c in g]
        else:
            kept = sorted((c for g in groups for c in g), key=length)
        counts = []
        for part in (kept[i : i + size] for i in range(0, len(kept), size)):
            prompts = {tuple(c["prompt_ids"]) for c in part}
            once = sum(map(len, prompts)) + sum(len(c["completion_ids"]) for c in part)
            counts.append((sum(map(length, part)), once if share else sum(map(length, part))))
        return counts

    scored = set()
    for line in lines:
        if line["batch"] not in scored:
            scored.add(line["batch"])
            for half in (0, 1):
                for rows in microbatches(line["batch"], half):
                    add(line["tick"], "activation", rows, Direction.FORWARD)
        for rows in microbatches(line["batch"], line["slice"]):
            add(line["tick"], "activation", rows, Direction.FORWARD)
            add(line["tick"], "gradient", rows, Direction.BACKWARD)
    return dict(sums)


def links_in_ledger(out: Path, link: str) -> Sums:
    sums: Sums = defaultdict(lambda: [0, 0, 0, 0])
    with (out / "ledger.csv").open() as file:
        for row in csv.DictReader(file):
            if row["link"] == link and row["kind"] in ("activation", "gradient"):
                assert row["direction"] == ("down" if row["kind"] == "activation" else "up")
                for i, column in enumerate(COLUMNS):
                    sums[(int(row["tick"]), row["kind"])][i] += int(row[column])
    return dict(sums)


@pytest.mark.parametrize(
    "links",
    [
        {"kind": "identity"},
        {"kind": "none"},
        {"kind": "lowrank", **RANKS, **UNROUNDED, "share_prompts": False},
        {"kind": "lowrank", **RANKS, **UNROUNDED, "share_prompts": True},
    ],
    ids=["identity", "none", "every-row", "prompts-once"],
)
def test_ledger_equals_what_shapes_say_and_what_was_received(
    links: dict[str, Any],
    recipe: Callable[..., Recipe],
    run_swarm: Swarm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    received = 0
    plain = Assembler.feed

    def counting(self: Assembler, message: bytes) -> Any:
        nonlocal received
        received += len(message)
        return plain(self, message)

    monkeypatch.setattr(Assembler, "feed", counting)
    made = recipe("llama")
    run_file = made.run_file(
        run={"ticks": 10}, links={"zstd": "off", **links}, anchor={"q_cadence": 4, "calibration_prompts": 1}
    )
    out = tmp_path / "run"
    run_swarm(run_file, out)

    lowrank = links["kind"] == "lowrank"
    spec = LinkSpec(kind=links["kind"], width=32, zstd="off", **(RANKS if lowrank else {}))
    wanted = expected_links(made.record, journal(out), spec, links.get("share_prompts", False))
    for link in ("stage0-stage1", "stage1-stage2"):
        assert links_in_ledger(out, link) == wanted
    with (out / "ledger.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(int(row["wire_bytes"]) > int(row["message_bytes"]) for row in rows)
    assert sum(int(row["message_bytes"]) for row in rows) == received, "something crossed a link uncounted"
    kinds = {row["kind"] for row in rows}
    assert kinds >= {"activation", "gradient", "rollout", "control"} | ({"basis", "sketch"} if lowrank else set())
    batches = [row for row in rows if row["link"] == "stage0-stage1" and row["kind"] == "rollout"]
    assert int(batches[0]["packet_bytes"]) == rollout_bytes(made.record)


def test_ledger_counts_the_packets_that_were_made(
    recipe: Callable[..., Recipe], run_swarm: Swarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the uniform quantiser no shape says what a packet costs, only what it costs at most."""
    made_by: dict[int, Sums] = {b: defaultdict(lambda: [0, 0, 0, 0]) for b in (0, 1)}
    encode = LinkEnd.encode

    def noting(self: LinkEnd, x: Any, direction: Direction, stamp: Stamp, crossing: Any, microbatch: int) -> Packet:
        packet = encode(self, x, direction, stamp, crossing, microbatch)
        size, kind = len(packet.payload), ("activation", "gradient")[direction]
        assert packet.dense_bytes == dense_bytes(32, crossing.repeated_rows)
        assert crossing.rows <= crossing.repeated_rows and size <= largest_packet_bytes(self.spec, direction, len(x))
        for i, value in enumerate((packet.dense_bytes, size, message_bytes(size), 1)):
            made_by[self.boundary][(stamp.tick, kind)][i] += value
        return packet

    monkeypatch.setattr(LinkEnd, "encode", noting)
    out = tmp_path / "run"
    links = {"kind": "lowrank", **RANKS, "outliers": 1.5}  # of which a random model has some
    anchor = {"q_cadence": 4, "calibration_prompts": 1}
    run_swarm(recipe("llama").run_file(run={"ticks": 10}, links=links, anchor=anchor), out)
    for boundary, link in enumerate(("stage0-stage1", "stage1-stage2")):
        assert links_in_ledger(out, link) == made_by[boundary]


def rollout_bytes(record: Path) -> int:
    first = [json.loads(line) for line in record.read_text().splitlines() if json.loads(line)["batch"] == 0]
    groups = [first[i : i + 4] for i in range(0, len(first), 4)]
    kept = [c for g in groups if len({c["reward"] for c in g}) > 1 for c in g]
    return batch_data_bytes(len(kept), sum(len(c["completion_ids"]) for c in kept), 2, vocab=48)
