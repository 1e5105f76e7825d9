"""The study of the links trains what a swarm trains, and measures what sampling would."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from anchor_node.export import export_run
from experiments.codec import cells, job, page, results
from experiments.codec.figures import MARGIN, cell, interval
from experiments.codec.job import Job
from experiments.codec.probe import Probe, right_answers
from experiments.codec.training import Training
from swarm_core.config import load
from swarm_core.data.prompts import encode_prompt
from swarm_core.manifest import make_manifest
from swarm_core.models.architecture import fingerprint, read_shape
from swarm_core.models.reading import load_tokenizer
from swarm_worker.sampler.hf import HfEngine

TINY = Path(__file__).parents[2] / "examples" / "tiny"


@pytest.mark.parametrize("backward", ["straight_through", "exact"])
def test_one_thread_trains_the_weights_of_a_swarm_bit_for_bit(
    backward: str, recipe: Callable[..., Any], run_swarm: Callable[..., str], tmp_path: Path
) -> None:
    # A basis that stays: when a newer one is adopted depends on the clock in a swarm.
    links = {"kind": "lowrank", "rank_forward": 12, "rank_backward": 16, "backward": backward}
    run_file = recipe("qwen2").run_file(
        run={"ticks": 10}, dgg={"enabled": True, "window": 2}, links=links,
        anchor={"q_cadence": 0, "calibration_prompts": 1},
    )  # fmt: skip
    run_swarm(run_file, tmp_path / "swarm")
    export_run(tmp_path / "swarm", tmp_path / "exported")
    training = Training(load(run_file), tmp_path / "thread")
    before = {name: tensor.clone() for name, tensor in training.chain.weights().items()}
    training.run()
    training.close()

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    wanted, got = dict(exported.named_parameters()), training.chain.weights()
    assert list(got) == list(wanted)
    assert not any(torch.equal(got[name], before[name]) for name in got if name.endswith("proj.weight"))
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []
    journals = [(tmp_path / run / "journal.jsonl").read_text() for run in ("swarm", "thread")]
    assert journals[0] == journals[1]

    with (tmp_path / "swarm" / "ledger.csv").open() as file:
        rows = list(csv.DictReader(file))
    sent = training.chain.ledger.take()
    for kind in ("activation", "gradient", "basis"):
        counted = sum(int(row["message_bytes"]) for row in rows if row["kind"] == kind)
        assert sum(row.message_bytes for row in sent if row.kind == kind) == counted > 0, kind


def test_expected_accuracy_is_what_sampling_approaches() -> None:
    config = load(TINY / "run.toml", {"links.kind": "identity"})
    path = TINY / "model"
    probe = Probe(make_manifest(config, read_shape(path), fingerprint(path)), path)
    rows, tokenizer, engine = cells.held_out(96), load_tokenizer(path), HfEngine(path)
    (eos_id,) = engine.eos_ids
    found = probe.accuracy(right_answers(tokenizer, rows, eos_id, 64, "auto"))

    prompts = [encode_prompt(tokenizer, row.prompt) for row in rows]
    answers = [[*tokenizer(row.answer)["input_ids"], eos_id] for row in rows]

    def share(samples: int, temperature: float) -> float:
        done = engine.generate(prompts, samples, temperature, 6, seed=3)
        return sum(g.completion_ids == answers[g.prompt_index] for g in done) / len(done)

    assert found.expected == pytest.approx(share(24, 1.0), abs=4 * math.sqrt(0.25 / (96 * 24)))
    assert found.greedy == pytest.approx(share(1, 0.0), abs=1e-9)


def test_a_cell_becomes_a_row_and_rows_a_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = {"run.ticks": "4", "grpo.prompts_per_batch": "8", "anchor.calibration_prompts": "8"}
    model = dataclasses.replace(cells.MODELS["tiny"], workload=cells.MODELS["tiny"].workload | small, problems=32)
    monkeypatch.setitem(cells.MODELS, "tiny", model)
    monkeypatch.setattr(job, "FIDELITY_PROMPTS", 8)
    lossy = next(name for name in cells.CELLS["tiny"] if name != cells.DENSE)
    file = tmp_path / "results.jsonl"
    for name in (cells.DENSE, lossy):
        results.append(file, json.loads(json.dumps(job.run_job(Job("tiny", name, 0), tmp_path / "runs"))))
    with file.open("a") as opened:
        opened.write('{"model": "tiny", "ce')  # a process killed while it wrote

    rows = results.read(file)
    assert {results.key(row) for row in rows} == {Job("tiny", name, 0).key for name in (cells.DENSE, lossy)}
    dense, compressed = results.table(rows, "tiny")
    assert (dense.name, compressed.name) == (cells.DENSE, lossy)
    assert dense.share_of_dense > compressed.share_of_dense > 0
    assert dense.end_kl < 1e-4 < compressed.end_kl
    assert dense.end_cosine > 0.999 > compressed.end_cosine
    assert "cell" in page.table([dense, compressed])
    page.plot({"tiny": [dense, compressed]}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_non_inferior_means_the_whole_interval_is_above_the_margin() -> None:
    assert interval([0.1, 0.3]).half == pytest.approx(12.706 * 0.1)
    assert math.isinf(interval([0.5]).half)

    def row(seed: int, accuracy: float) -> dict[str, Any]:
        measured = {
            "weights": {"expected": accuracy, "greedy": 1.0},
            "links": {"expected": accuracy, "greedy": 1.0},
            "fidelity": {"kl": 0.0, "largest_logp_shift": 0.0, "gradient_cosine": [1.0]},
        }
        sizes = ("share_of_dense", "forward_per_token", "backward_per_token", "basis_and_sketch_share")
        return {
            "cell": "x", "seed": seed, "overrides": {}, "start": measured, "end": measured,
            "bytes": dict.fromkeys(sizes, 1.0), "gated": 0, "cpu_s": 1.0,
        }  # fmt: skip

    dense = [row(seed, 0.9 + 0.05 * seed) for seed in range(3)]
    close = [row(seed, 0.9 + 0.05 * seed - 0.5 * MARGIN + 1e-4 * seed) for seed in range(3)]
    spread = [row(seed, 0.9 + 0.05 * seed - 0.5 * MARGIN + 1e-2 * seed) for seed in range(3)]
    assert cell(close, dense).non_inferior is True
    assert cell(spread, dense).non_inferior is False
    assert cell(close, dense[:1]).non_inferior is None
