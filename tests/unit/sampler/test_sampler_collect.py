"""From rows to a rollout batch and to a validation accuracy, with the shipped model and a scripted engine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swarm_core.data.dataset import Row, load_rows, prompt_indices
from swarm_core.models.reading import load_tokenizer
from swarm_worker.sampler.collect import Collected, Collector, SamplingSpec, generation_seed
from swarm_worker.sampler.engine import Generation
from swarm_worker.sampler.errors import SamplerError
from swarm_worker.sampler.evaluate import EvaluationSpec, evaluate
from swarm_worker.sampler.hf import HfEngine
from swarm_worker.sampler.verify import VerifierPool

TINY = Path(__file__).parents[3] / "examples" / "tiny"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return load_rows(TINY / "data" / "train.jsonl")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TINY / "model")


@pytest.fixture(scope="module")
def engine() -> HfEngine:
    return HfEngine(TINY / "model", version=3)


@pytest.fixture(scope="module")
def verifier() -> Iterator[VerifierPool]:
    with VerifierPool("exact_integer", processes=1) as pool:
        yield pool


class Scripted:
    """An engine whose answers are written down; the last prompt's are cut at the limit."""

    version = 9

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        self._tokenizer = tokenizer
        self._texts = texts

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        raise AssertionError("nobody loads weights here")

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], n: int, temperature: float, max_new_tokens: int, seed: int
    ) -> list[Generation]:
        done = []
        for place, text in enumerate(self._texts):
            truncated = place // n == len(prompt_ids) - 1
            ids = self._tokenizer(text)["input_ids"] + ([] if truncated else [self._tokenizer.eos_token_id])
            done.append(Generation(place // n, ids, [-0.5] * len(ids), truncated))
        return done


def test_a_batch_is_what_the_protocol_says(
    engine: HfEngine, tokenizer: Any, rows: list[Row], verifier: VerifierPool
) -> None:
    spec = SamplingSpec(prompts=6, group_size=4, max_new_tokens=5, seed=2)
    collected = Collector(engine, tokenizer, rows, verifier, spec).collect(7)
    rollouts = collected.rollouts
    assert (rollouts.batch, rollouts.weight_version, rollouts.group_size) == (7, 3, 4)
    indices = [index for index in prompt_indices(len(rows), 2, 7, 6) for _ in range(4)]
    assert [c.prompt_index for c in rollouts.completions] == indices
    for completion, sample, index in zip(rollouts.completions, collected.samples, indices, strict=True):
        text = tokenizer.decode(completion.completion_ids, skip_special_tokens=True)
        assert tokenizer.decode(completion.prompt_ids) == rows[index].prompt == sample.prompt
        assert (sample.completion, sample.answer) == (text, rows[index].answer)
        assert completion.reward == sample.verdict.reward == float(text == rows[index].answer)
        assert completion.truncated == (completion.completion_ids[-1] != tokenizer.eos_token_id)
    rewards = {c.reward for c in rollouts.completions}
    assert rewards == {0.0, 1.0}


def test_a_batch_is_a_function_of_its_number(
    engine: HfEngine, tokenizer: Any, rows: list[Row], verifier: VerifierPool
) -> None:
    def collected(seed: int, batch: int) -> Collected:
        spec = SamplingSpec(prompts=3, group_size=2, max_new_tokens=5, seed=seed)
        return Collector(engine, tokenizer, rows, verifier, spec).collect(batch)

    assert collected(0, 4) == collected(0, 4)
    assert collected(0, 4).rollouts != collected(0, 5).rollouts
    assert len({generation_seed(seed, batch) for seed in range(30) for batch in range(30)}) == 900
    assert all(0 <= generation_seed(seed, 1) < 2**63 for seed in range(30))


def test_metrics_are_counted_by_hand(tokenizer: Any, verifier: VerifierPool) -> None:
    rows = [Row("1+1=", "2"), Row("2+2=", "not a number"), Row("3+3=", "6")]
    (first, second, third) = prompt_indices(3, 0, 0, 3)
    answers = {0: ["2", "22"], 1: ["4", "4"], 2: ["6", "6"]}
    scripted = Scripted(tokenizer, answers[first] + answers[second] + answers[third])
    spec = SamplingSpec(prompts=3, group_size=2, max_new_tokens=5)
    collected = Collector(scripted, tokenizer, rows, verifier, spec).collect(0)
    by_row = {c.prompt_index: [] for c in collected.rollouts.completions}
    for completion in collected.rollouts.completions:
        by_row[completion.prompt_index].append(completion.reward)
    assert by_row == {0: [1.0, 0.0], 1: [None, None], 2: [1.0, 1.0]}
    metrics = collected.metrics
    assert metrics["reward"] == 0.75
    assert metrics["verifier/declined"] == 2
    assert metrics["verifier/scored"] == 4
    assert metrics["verifier/timed_out"] == 0
    assert metrics["completions/clipped_ratio"] == pytest.approx(1 / 3)
    assert metrics["completions/eos_ratio"] == pytest.approx(2 / 3)
    assert metrics["sampling/logprob_mean"] == -0.5


@pytest.mark.parametrize(
    "change",
    [{"prompts": 0}, {"group_size": 0}, {"max_new_tokens": 0}, {"temperature": 0.0}, {"temperature": math.nan}],
)
def test_numbers_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SamplerError, match="wanted prompts"):
        SamplingSpec(**({"prompts": 1, "group_size": 2} | change))


def test_no_rows_are_refused(engine: HfEngine, tokenizer: Any, verifier: VerifierPool) -> None:
    with pytest.raises(SamplerError, match="no rows"):
        Collector(engine, tokenizer, [], verifier, SamplingSpec(1, 2))
    with pytest.raises(SamplerError, match="nothing to evaluate"):
        evaluate(engine, tokenizer, [], verifier, EvaluationSpec())


def test_evaluation_is_fixed_by_its_seed(
    engine: HfEngine, tokenizer: Any, rows: list[Row], verifier: VerifierPool
) -> None:
    spec = EvaluationSpec(max_new_tokens=5, seed=1, samples_per_prompt=2)
    result = evaluate(engine, tokenizer, rows[:60], verifier, spec)
    assert evaluate(engine, tokenizer, rows[:60], verifier, spec) == result
    assert result.accuracy == result.mean_reward
    assert (result.completions, result.failed, result.weight_version) == (120, 0, 3)
    assert 0.02 < result.standard_error < 0.08
    greedy = evaluate(engine, tokenizer, rows[:60], verifier, EvaluationSpec(temperature=0.0, max_new_tokens=5))
    assert greedy.accuracy > 0.95 > result.accuracy


def test_evaluation_of_the_compressed_pipeline(
    engine: HfEngine, tokenizer: Any, rows: list[Row], verifier: VerifierPool
) -> None:
    spec = EvaluationSpec(temperature=0.0, max_new_tokens=5)
    plain = evaluate(engine, tokenizer, rows[:60], verifier, spec)
    exact = evaluate(engine, tokenizer, rows[:60], verifier, spec, projections={2: lambda h_NH: h_NH.double()})
    assert exact == plain
    q_HR = torch.linalg.qr(torch.randn(96, 10, generator=torch.Generator().manual_seed(0)))[0]
    random = evaluate(engine, tokenizer, rows[:60], verifier, spec, projections={2: lambda h_NH: h_NH @ q_HR @ q_HR.T})
    assert random.accuracy < 0.3 < plain.accuracy


def test_a_failed_verdict_is_not_right(tokenizer: Any, verifier: VerifierPool, engine: HfEngine) -> None:
    rows = [Row("11+11=", "22"), Row("11+12=", "unreadable")]
    spec = EvaluationSpec(temperature=0.0, max_new_tokens=5)
    result = evaluate(engine, tokenizer, rows, verifier, spec)
    assert (result.accuracy, result.mean_reward, result.failed) == (0.5, 1.0, 1)
    assert result.failures == "", "it declined one answer, which is its right"
