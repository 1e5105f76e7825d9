"""The manifest: it comes back from JSON as it was, and its digest is blind to exactly the knobs that are listed."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from codec.errors import CodecError
from swarm_core.config import ConfigError, RunConfig, load
from swarm_core.learning.partition import PartitionError
from swarm_core.manifest import OUTSIDE_DIGEST, Manifest, ManifestError, make_manifest, read_manifest
from swarm_core.models.architecture import read_shape

TINY = Path(__file__).parents[2] / "examples" / "tiny"

# Another value of every knob, such that it goes together with all the others of BASE.
OTHER: dict[str, dict[str, Any]] = {
    "run": {"name": "other", "seed": 8, "ticks": 9, "device": "cuda", "precision": "bf16", "threads": 3},
    "model": {"path": "/elsewhere"},
    "swarm": {"stages": 2, "split": [1, 2, 3], "microbatch_size": 5, "logprob_chunk": 7},
    "data": {"train": "/x", "validation": "/y", "reward": "gsm8k", "chat_template": "off", "verifier_timeout_s": 1.5},
    "grpo": {
        "prompts_per_batch": 6, "completions_per_prompt": 3, "ticks_per_pass": 1, "max_reuse": 2, "loss": "grpo",
        "clip_low": 0.1, "clip_high": 0.3, "dual_clip": 3.0, "kl_beta": 0.1, "scale_rewards": "none",
        "ratio_level": "sequence", "sampler_correction_cap": None, "mask_truncated": True, "temperature": 0.7,
        "max_completion_length": 9, "max_staleness": 99,
    },
    "dgg": {"enabled": False, "tau": 0.7, "window": 5},
    "optimizer": {
        "lr": 1e-3, "beta1": 0.8, "beta2": 0.9, "eps": 1e-7, "weight_decay": 0.1, "max_grad_norm": 2.0,
        "warmup_ticks": 2, "schedule": "linear",
    },
    "links": {
        "kind": "none", "rank_forward": 4, "rank_backward": 5, "backward": "exact", "zstd": "off", "fit": "plain",
        "fit_ridge": 0.5, "quantiser_forward": "bf16", "quantiser_backward": "int8", "step_forward": 0.1,
        "step_backward": 0.1, "gradient_scale": "row", "stochastic_rounding": True, "outliers": 4.0,
        "reuse_deltas": True, "reuse_memory_mb": 1, "share_prompts": False, "bytes_per_token": 9.0,
        "target_share": 0.5, "fidelity_every": 7, "fidelity_sequences": 3,
    },
    "anchor": {
        "q_cadence": 3, "calibration_prompts": 4, "q_source": "anchor_replay", "pin_basis": False, "m_cadence": 7,
        "latency": "natural", "delay_k": 9, "latency_range": [2, 3], "latency_sigma": 0.1, "latency_trace": "/t",
        "slowdown": 2.0, "snapshot": "exact", "ring_mb": 9,
    },
    "corrections": {
        "merger": "held_delta", "form": "topk", "rank": 9, "share": 0.5, "alpha": 0.5, "beta_anc": 0.5, "age_decay": 0.5,
        "age_from": "birth", "adaptive_lambda": "none", "lambda_cap": 0.25, "c_max": 2.0, "k_max": 50,
    },
    "sampler": {
        "engine": "replay", "overlap": False, "batch_size": 3, "record": True, "replay": "/z", "eval_every": 9,
        "eval_prompts": 7, "eval_samples": 2,
    },
    "checkpoint": {"every": 5, "keep": 9, "hf": False, "off_host": False},
}  # fmt: skip
TOGETHER = {
    "sampler.engine": {"replay": "/z"}, "sampler.replay": {"engine": "replay"},
    "anchor.latency": {"latency_trace": "none"},
}  # fmt: skip
# What some of the other values need beside them, in another section.
BASE = {
    "links.reuse_deltas": "false",
    "corrections.merger": "signed_ema",
    "anchor.latency_trace": "/other",
    "anchor.latency": "trace",
}


@pytest.fixture(scope="module")
def base() -> Manifest:
    return make_manifest(load(TINY / "run.toml", BASE), read_shape(TINY / "model"), "a0" * 32)


def changed(manifest: Manifest, section: str, **values: Any) -> Manifest:
    plain = json.loads(manifest.config.canonical_json())
    plain[section] |= values
    return replace(manifest, config=RunConfig.model_validate_json(json.dumps(plain)))


KNOBS = [(s, name) for s, field in RunConfig.model_fields.items() for name in field.annotation.model_fields]  # type: ignore[union-attr]

DERIVED = [f.name for f in fields(Manifest) if f.name != "config"]


def outside(section: str, name: str) -> bool:
    return section in OUTSIDE_DIGEST and (OUTSIDE_DIGEST[section] is None or name in (OUTSIDE_DIGEST[section] or ()))


@pytest.mark.parametrize(("section", "name"), KNOBS)
def test_the_digest_is_blind_to_exactly_the_listed_knobs(section: str, name: str, base: Manifest) -> None:
    other = changed(base, section, **{name: OTHER[section][name]}, **TOGETHER.get(f"{section}.{name}", {}))
    assert getattr(getattr(other.config, section), name) != getattr(getattr(base.config, section), name)
    assert (other.digest() == base.digest()) == outside(section, name)


def test_what_is_listed_exists() -> None:
    for section, names in OUTSIDE_DIGEST.items():
        assert section in RunConfig.model_fields
        assert {(section, name) for name in names or ()} <= set(KNOBS)


def test_nothing_that_shapes_the_weights_is_listed() -> None:
    for section in ("swarm", "grpo", "dgg", "optimizer", "corrections"):
        assert section not in OUTSIDE_DIGEST
    for section, name in (("run", "seed"), ("run", "precision"), ("data", "reward"), ("data", "chat_template")):
        assert not outside(section, name)


def test_the_last_tick_counts_where_it_shapes_the_learning_rate(base: Manifest) -> None:
    for schedule in ("linear", "cosine"):
        shaped = changed(base, "optimizer", schedule=schedule)
        assert changed(shaped, "run", ticks=999).digest() != shaped.digest()
        assert changed(shaped, "run", name="x").digest() == shaped.digest()


@pytest.mark.parametrize("field", DERIVED)
def test_what_came_from_the_checkpoint_is_in_the_digest(field: str, base: Manifest) -> None:
    value = getattr(base, field)
    other = value[::-1] if isinstance(value, tuple | str) else value + 1
    assert other != value
    assert replace(base, **{field: other}).digest() != base.digest()


def test_a_manifest_comes_back_and_is_canonical(base: Manifest) -> None:
    text = base.to_json()
    back = read_manifest(text)
    assert back == base and back.to_json() == text and back.digest() == base.digest()
    assert read_manifest(json.dumps(json.loads(text), indent=3)).to_json() == text
    assert "\n" not in text and text.isascii() and len(base.digest()) == 64


def test_what_the_stages_take_from_it(base: Manifest) -> None:
    assert (base.stages, base.boundaries) == (3, 2)
    assert [span.first_layer for span in base.spans[1:]] == [span.last_layer for span in base.spans[:-1]]
    link = base.link()
    assert (link.kind, link.width, link.rank_forward) == ("lowrank", base.width, round(base.width / 2))
    dense = changed(base, "links", kind="none").link()
    assert (dense.kind, dense.rank_forward, dense.rank_backward, dense.dtype) == ("none", 0, 0, "fp32")
    lossless = changed(base, "links", kind="identity")
    assert changed(lossless, "run", precision="fp64").link().dtype == "fp64"


def test_what_cannot_be_is_refused_before_anything_starts(base: Manifest) -> None:
    shape = read_shape(TINY / "model")
    with pytest.raises(ConfigError, match="larger than the width"):
        make_manifest(changed(base, "links", rank_forward=10_000).config, shape, "x")
    with pytest.raises((PartitionError, CodecError)):
        make_manifest(changed(base, "swarm", stages=99).config, shape, "x")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"config": {}}', "\x00"])
def test_what_is_no_manifest_is_said_in_one_line(text: str) -> None:
    with pytest.raises((ManifestError, ConfigError)) as caught:
        read_manifest(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["config", *DERIVED])
def test_a_manifest_without_one_of_its_parts(field: str, base: Manifest) -> None:
    plain = json.loads(base.to_json())
    del plain[field]
    with pytest.raises(ManifestError, match="are both ends the same version"):
        read_manifest(json.dumps(plain))


def test_a_knob_that_this_version_does_not_know(base: Manifest) -> None:
    plain = json.loads(base.to_json())
    plain["config"]["grpo"]["brand_new"] = 1
    with pytest.raises((ManifestError, ConfigError), match="brand_new"):
        read_manifest(json.dumps(plain))
