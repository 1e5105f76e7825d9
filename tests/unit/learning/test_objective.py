"""What stages and the anchor's replay share: knobs to a loss specification, precision by device, seeds of packets."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product
from typing import Any

import pytest
import torch

from swarm_core.config import RunConfig
from swarm_core.knobs import DataSection, GrpoSection, LinksSection, ModelSection, RunSection, SwarmSection
from swarm_core.learning.grpo import LossSpec
from swarm_core.learning.objective import loss_spec, make_objective, packet_seed

OTHER: dict[str, Any] = {
    "loss": "dr_grpo", "clip_low": 0.1, "clip_high": 0.3, "dual_clip": 3.0, "kl_beta": 0.04, "ratio_level": "sequence",
    "sampler_correction_cap": None, "max_completion_length": 9, "scale_rewards": "none", "mask_truncated": True,
}  # fmt: skip
RENAMED = {"kl_beta": "beta", "ratio_level": "level", "sampler_correction_cap": "tis_cap"}


def config(grpo: dict[str, Any] | None = None, **run: Any) -> RunConfig:
    return RunConfig(
        links=LinksSection(kind="identity"),
        run=RunSection(**run),
        model=ModelSection(path="model"),
        swarm=SwarmSection(logprob_chunk=17),
        data=DataSection(train="train.jsonl"),
        grpo=GrpoSection(**grpo or {}),
    )


def test_every_knob_of_the_loss_reaches_it() -> None:
    wanted = {RENAMED.get(name, name): value for name, value in OTHER.items()}
    assert asdict(loss_spec(config(OTHER))) == wanted
    plain = asdict(loss_spec(config()))
    assert set(plain) == set(wanted) and all(plain[name] != value for name, value in wanted.items())
    assert asdict(LossSpec(max_completion_length=plain["max_completion_length"])) == plain, "the defaults are the same"


@pytest.mark.parametrize(
    ("precision", "device", "dtype", "compute_dtype"),
    [
        ("auto", "cpu", torch.float32, torch.float32),
        ("auto", "cuda", torch.float32, torch.bfloat16),
        ("fp32", "cuda", torch.float32, torch.float32),
        ("bf16", "cpu", torch.float32, torch.bfloat16),
        ("fp64", "cpu", torch.float64, torch.float64),
    ],
)
def test_precision_by_knob_and_device(
    precision: str, device: str, dtype: torch.dtype, compute_dtype: torch.dtype
) -> None:
    made = make_objective(config({"temperature": 0.7}, precision=precision), torch.device(device))
    assert (made.dtype, made.compute_dtype, made.temperature, made.chunk) == (dtype, compute_dtype, 0.7, 17)
    if device == "cpu":
        a = torch.ones(2, 2, dtype=dtype)
        with made.autocast():
            assert (a @ a).dtype == compute_dtype


def test_each_packet_has_a_seed_of_its_own_that_stays() -> None:
    places = list(product((0, 2**32 - 1), range(3), range(2), range(3), range(3)))
    seeds = [packet_seed(*place) for place in places]
    assert len(set(seeds)) == len(places) and all(0 <= seed < 2**63 for seed in seeds)
    # Runs that were begun by another version go on with the same rounding.
    assert packet_seed(7, 40, 0, 3, 1) == 4756149515817330635
