"""bf16 compute over fp32 master weights: the path of a GPU, on whatever device is here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Swarm = Callable[..., str]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")),
]


def first_tick(out: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in rows if row["type"] == "tick")


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_compute_follows_fp32_with_fp32_masters(
    device: str, recipe: Callable[..., Any], run_swarm: Swarm, tmp_path: Path
) -> None:
    run_file = recipe("qwen2").run_file(run={"ticks": 4, "device": device})
    run_swarm(run_file, tmp_path / "exact", overrides={"run.precision": "fp32"})
    run_swarm(run_file, tmp_path / "mixed", overrides={"run.precision": "bf16"})
    exact, mixed = first_tick(tmp_path / "exact"), first_tick(tmp_path / "mixed")
    assert mixed["grad_norm"] != exact["grad_norm"], "bf16 was not used"
    for name in ("loss", "entropy", "grad_norm"):
        assert mixed[name] == pytest.approx(exact[name], rel=0.05, abs=0.005), name
    shard = load_file(next((tmp_path / "mixed").glob("checkpoints/*/stage-00-of-03.safetensors")))
    assert {t.dtype for name, t in shard.items() if name.startswith(("model.", "optimizer."))} == {torch.float32}
    assert json.loads((tmp_path / "mixed" / "journal.jsonl").read_text().splitlines()[-1])["outcome"] == "COMMIT"


@pytest.mark.parametrize("device", DEVICES)
def test_lowrank_links_run_on_the_device(
    device: str, recipe: Callable[..., Any], run_swarm: Swarm, tmp_path: Path
) -> None:
    made = recipe("qwen3")
    for backward in ("straight_through", "exact"):
        links = {"kind": "lowrank", "rank_forward": 8, "rank_backward": 12, "backward": backward, "fit": "weighted"}
        run_file = made.run_file(
            run={"ticks": 16, "device": device}, links=links, anchor={"q_cadence": 2, "calibration_prompts": 1}
        )
        out = tmp_path / backward
        run_swarm(run_file, out)
        tick = first_tick(out)
        assert 0.2 < tick["basis/share_forward/boundary_0"] <= 1.0
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert any(row.get("event") == "basis" for row in rows), "no basis was refreshed"
        pinned = [(row["batch"], row["basis/version"]) for row in rows if row["type"] == "tick"]
        assert len(set(pinned)) == len({batch for batch, _ in pinned}), "a batch saw two basis versions"
        assert max(version for _, version in pinned) > 0, "no refreshed basis was adopted"
