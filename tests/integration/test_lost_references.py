"""A receiver that does not hold what an activation refers to gets it whole, and the run is the same to the last bit."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from codec.errors import ReferenceMismatch
from codec.spec import Direction
from swarm_core.wire.messages import Mode
from swarm_worker.compute import StageCompute
from swarm_worker.link_ends import LinkEnd, Packet
from swarm_worker.schedule import Stamp
from swarm_worker.shard import read_shard, shard_name
from swarm_worker.worker import StageWorker

Recipe = Any
TICKS = 8


def norms(out: Path) -> list[float]:
    rows = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return [row["grad_norm"] for row in rows if row["type"] == "tick"]


def packets(out: Path) -> int:
    """Activations that crossed."""
    with (out / "ledger.csv").open() as file:
        return sum(int(row["frames"]) for row in csv.DictReader(file) if row["kind"] == "activation")


def test_lost_references_change_nothing(
    recipe: Callable[..., Recipe], run_swarm: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = recipe("llama").run_file(
        run={"ticks": TICKS},
        links={"kind": "lowrank", "rank_forward": 8, "rank_backward": 16},
        anchor={"q_cadence": 0, "calibration_prompts": 1},
    )
    run_swarm(run_file, tmp_path / "plain")
    rng, seen, resent = random.Random(0), set(), []
    decode = LinkEnd.decode

    def loses(self: LinkEnd, packet: Any, direction: Direction, stamp: Stamp, crossing: Any, microbatch: int) -> Any:
        place = (self.boundary, stamp.key, microbatch)
        if direction is Direction.FORWARD and stamp.mode is Mode.TRAIN and place not in seen:
            seen.add(place)
            if rng.random() < 0.5:
                raise ReferenceMismatch(1, 0)
        return decode(self, packet, direction, stamp, crossing, microbatch)

    def resend(self: StageCompute, stamp: Stamp, microbatch: int) -> Packet:
        assert self.below is not None
        live = self._live[microbatch]
        resent.append(microbatch)
        return self.below.encode(live.left_UH, Direction.FORWARD, stamp, live.crossing, microbatch)

    monkeypatch.setattr(LinkEnd, "decode", loses)
    monkeypatch.setattr(StageCompute, "resend", resend)
    run_swarm(run_file, tmp_path / "lossy", overrides={"links.fidelity_every": "2"})
    assert norms(tmp_path / "lossy") == norms(tmp_path / "plain") and len(resent) > 10


@pytest.mark.parametrize("boundary", [0, 1])
def test_a_receiver_that_forgot_a_pass_gets_it_whole(
    boundary: int, recipe: Callable[..., Recipe], run_swarm: Callable[..., str], tmp_path: Path, monkeypatch: Any
) -> None:
    """What the score pass made is gone at one end before the first tick, and all of pass 1 before pass 2."""
    run_file = recipe("qwen3").run_file(
        run={"ticks": TICKS},
        swarm={"microbatch_size": 6},  # cuts groups in two, so that a prompt's rows are in two packets of a tick
        links={"kind": "lowrank", "rank_forward": 8, "rank_backward": 16},
        anchor={"q_cadence": 0, "calibration_prompts": 1},
    )
    run_swarm(run_file, tmp_path / "plain")
    decode, ask_again = LinkEnd.decode, StageWorker._ask_again
    forgotten, asked = set(), []

    def forgets(self: LinkEnd, packet: Any, direction: Direction, stamp: Stamp, *rest: Any) -> Any:
        due = stamp.mode is Mode.TRAIN and stamp.tick in (0, 2, 6)
        if due and (self.boundary, direction) == (boundary, Direction.FORWARD) and stamp.tick not in forgotten:
            forgotten.add(stamp.tick)
            assert self.reuse is not None and (stamp.tick == 0 or self.reuse.held_bytes)
            self.forget()
        return decode(self, packet, direction, stamp, *rest)

    def asks(self: StageWorker, stamp: Stamp, microbatch: int) -> None:
        asked.append((self.span.stage, stamp.tick))
        ask_again(self, stamp, microbatch)

    monkeypatch.setattr(LinkEnd, "decode", forgets)
    monkeypatch.setattr(StageWorker, "_ask_again", asks)
    out = tmp_path / "lossy"
    run_swarm(run_file, out)
    assert {stage for stage, _ in asked} == {boundary + 1} and {0, 2, 6} <= {tick for _, tick in asked}
    assert packets(out) == packets(tmp_path / "plain") + len(asked), "each was sent once more, and is in the ledger"
    for stage in range(3):
        plain, lossy = (
            read_shard(tmp_path / name / "checkpoints" / f"tick-{TICKS:08d}" / shard_name(stage, 3)).tensors
            for name in ("plain", "lossy")
        )
        assert plain.keys() == lossy.keys() and all(torch.equal(plain[name], lossy[name]) for name in plain)
