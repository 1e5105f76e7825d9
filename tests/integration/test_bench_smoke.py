"""The bench compares like with like: one tick of torch's side has the loss and the gradients of the swarm's own work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from experiments.bench.figures import SETTLING, Pair, bubble, cells, markdown_table, median_tick_s, summary
from experiments.bench.sides import Tick, Turn
from experiments.bench.torch_side import read_batches, read_manifest
from experiments.bench.workload import Setup, Workload, build
from swarm_core.manifest import Manifest
from swarm_worker.compute import StageCompute
from swarm_worker.schedule import Stamp

ROOT = Path(__file__).resolve().parents[2]
SMALL = Workload(
    "small", 40, prompts=4, group_size=3, microbatch_size=3, length=10, shortest_prompt=3, longest_prompt=6, turn=1,
    hidden=32, intermediate=64, layers=2, heads=2, kv_heads=1,
)  # fmt: skip


def torch_tick(setup: Setup, folder: Path) -> list[Path]:
    """One tick of the two ranks, as the bench starts them; where their gradients are."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "proto")))
    files = [folder / f"gradients-{rank}.safetensors" for rank in (0, 1)]
    common = ["--config", setup.config, "--rollouts", setup.rollouts, "--rendezvous", folder / "rendezvous"]
    command = [sys.executable, "-m", "experiments.bench.torch_side", *map(str, common)]
    ranks = [
        subprocess.Popen([*command, "--rank", str(rank), "--gradients", str(file)], env=environment)
        for rank, file in enumerate(files)
    ]
    try:
        assert [rank.wait(60) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return files


def chain_tick(manifest: Manifest, setup: Setup) -> tuple[list[StageCompute], float]:
    """The same tick through the swarm's stages and codec in one process; the stages and the tick's loss."""
    first, last = stages = [StageCompute(manifest, i, setup.model, torch.device("cpu")) for i in (0, 1)]
    batch = read_batches(manifest, setup.rollouts, first)[0]
    for stage in stages:
        stage.add_batch(batch)
    stamp = Stamp(microbatches=batch.microbatches[0])
    for microbatch in range(stamp.microbatches):
        activation = first.forward(stamp, microbatch, None)
        gradient = last.loss(stamp, microbatch, activation.payload)
        assert gradient is not None
        first.backward(stamp, microbatch, gradient.payload)
    first.tally(stamp)
    return stages, last.tally(stamp).numbers["loss"]


def test_both_sides_train_the_same_thing(tmp_path: Path) -> None:
    setup = build(SMALL, tmp_path / "setup")
    files = torch_tick(setup, tmp_path)
    stages, loss = chain_tick(read_manifest(setup.config), setup)
    for stage, file in zip(stages, files, strict=True):
        theirs = load_file(file)
        assert list(theirs) and set(theirs) == set(stage.names)
        for name, parameter in zip(stage.names, stage.parameters, strict=True):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
            assert torch.equal(parameter.grad, theirs[name]), name
    with safe_open(files[1], "pt") as opened:
        assert float.fromhex(opened.metadata()["loss"]) == loss != 0.0


def test_a_workload_has_no_padding_and_fills_its_microbatches(tmp_path: Path) -> None:
    setup = build(SMALL, tmp_path / "setup")
    lines = [json.loads(line) for line in setup.rollouts.read_text().splitlines()]
    assert {len(line["prompt_ids"]) + len(line["completion_ids"]) for line in lines} == {SMALL.length}
    manifest = read_manifest(setup.config)
    stage = StageCompute(manifest, 0, setup.model, torch.device("cpu"))
    for batch in read_batches(manifest, setup.rollouts, stage):
        assert batch.microbatches == (SMALL.microbatches,)
        assert sum(batch.layout(0, i).tokens for i in range(SMALL.microbatches)) == SMALL.tokens


def test_figures_are_those_of_counted_ticks() -> None:
    def turn(tick_s: float, busy_s: float) -> Turn:
        unsettled = [Tick(100.0, (0.0, 0.0))] * SETTLING
        return Turn([*unsettled, *[Tick(tick_s, (busy_s, busy_s))] * 3], (1.0, 1.0))

    found = summary([Pair(turn(2.0, 1.5), turn(1.0, 0.8)), Pair(turn(1.0, 0.75), turn(0.9, 0.72))], 100, 4)
    assert median_tick_s(turn(2.0, 1.0)) == 2.0
    assert found["ratio_range"] == [0.5, 0.9] and found["ratio"] == 0.7
    assert found["swarm"]["tokens_per_s"] == 100 / 1.5
    assert found["swarm"]["waiting_share"] == [0.25, 0.25]
    assert found["bubble_share"] == bubble(4, 2) == 0.2
    assert "0.700" in markdown_table([cells("x", found)])
