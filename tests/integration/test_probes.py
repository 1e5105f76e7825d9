"""Probes of the links in a whole swarm: they change no bit, and say what the links do to log-probs and gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm_worker.shard import read_shard, shard_name

Recipe = Any
TICKS = 8
LAST = f"checkpoints/tick-{TICKS:08d}"


def rows(out: Path) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["type"] == "tick"]


# All columns, and steps near the smallest: a random model is a chaotic one.
LOWRANK = {"kind": "lowrank", "rank_forward": 32, "rank_backward": 32, "step_forward": 0.02, "step_backward": 0.02}
LINKS = {"identity": {"kind": "identity"}, "none": {"kind": "none"}, "uniform": LOWRANK}


@pytest.mark.parametrize("kind", LINKS)
def test_probes_measure_and_change_nothing(
    kind: str, recipe: Callable[..., Recipe], run_swarm: Callable[..., str], tmp_path: Path
) -> None:
    made = recipe("llama")
    # A basis that stays: when a newer one is adopted depends on the clock.
    anchor = {"q_cadence": 0, "calibration_prompts": 1}
    run_file = made.run_file(links=LINKS[kind], run={"ticks": TICKS}, anchor=anchor)
    run_swarm(run_file, tmp_path / "plain")
    run_swarm(run_file, tmp_path / "probed", overrides={"links.fidelity_every": "3", "links.fidelity_sequences": "4"})
    plain, probed = rows(tmp_path / "plain"), rows(tmp_path / "probed")
    assert [row["grad_norm"] for row in probed] == [row["grad_norm"] for row in plain]
    for stage in range(3):
        a, b = (read_shard(tmp_path / run / LAST / shard_name(stage, 3)).tensors for run in ("plain", "probed"))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    wanted = {f"fidelity/{what}/stage_{i}" for what in ("grad_cosine", "grad_norm_ratio") for i in range(3)}
    wanted |= {"fidelity/kl", "fidelity/kl_max", "fidelity/logp_diff_max"}
    for row in probed:
        found = {name: value for name, value in row.items() if name.startswith("fidelity/")}
        assert set(found) == (wanted if row["tick"] % 3 == 0 else set())
        for name, value in found.items():
            exact = 0.0 if "kl" in name or "logp" in name else 1.0
            limit = 0.2 if kind == "uniform" and "kl" not in name else 0.05
            if kind == "identity":
                assert value == pytest.approx(exact, abs=1e-12), name
            else:
                assert value != exact and value == pytest.approx(exact, abs=limit), (name, value)
