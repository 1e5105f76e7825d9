"""One rollout batch: prompts -> completions -> rewards. No model, no loss and no file lives here."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swarm_core.data.dataset import Row, prompt_indices
from swarm_core.data.prompts import ChatTemplate, completion_text, encode_prompt
from swarm_core.learning.rollout import Completion, RolloutBatch, reward_metrics
from swarm_worker.sampler.engine import Engine
from swarm_worker.sampler.errors import SamplerError
from swarm_worker.sampler.verify import OUTCOMES, Call, Verdict, VerifierPool


@dataclass(frozen=True)
class SamplingSpec:
    """How a batch is sampled. `max_new_tokens` counts the end token; `seed` fixes prompts and draws."""

    prompts: int
    group_size: int
    temperature: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    chat_template: ChatTemplate = "auto"

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.group_size < 1 or self.max_new_tokens < 1 or not self.temperature > 0:
            raise SamplerError(
                f"{self}: wanted prompts, group_size and max_new_tokens from 1 up and a temperature above 0 "
                "(a group of greedy completions has nothing to compare)"
            )


@dataclass(frozen=True)
class Sample:
    """One completion in words, for people to read."""

    prompt: str
    completion: str
    answer: str
    verdict: Verdict


@dataclass(frozen=True)
class Collected:
    """A rollout batch, its metrics under the names that TRL uses, and every completion as text, in the same order."""

    rollouts: RolloutBatch
    metrics: dict[str, float]
    samples: list[Sample]


class Collector:
    """Makes rollout batch number b out of (engine, rows, spec): a function of b and of the engine's weights alone.

    So nothing is lost or seen twice when a run resumes at b. Verdicts that are None (see VerifierPool) stay None:
    `swarm_core.learning.advantages` leaves them out of their group.
    """

    def __init__(
        self, engine: Engine, tokenizer: Any, rows: Sequence[Row], verifier: VerifierPool, spec: SamplingSpec
    ) -> None:
        if not rows:
            raise SamplerError("no rows to sample prompts from; load a data file with at least one")
        self.engine = engine
        self.tokenizer = tokenizer
        self.rows = rows
        self.verifier = verifier
        self.spec = spec

    def collect(self, batch: int) -> Collected:
        """Raises what the engine, the tokenizer and the verifier raise: SamplerError and its kinds, DataError."""
        spec = self.spec
        indices = prompt_indices(len(self.rows), spec.seed, batch, spec.prompts)
        rows = [self.rows[index] for index in indices]
        prompt_ids = [encode_prompt(self.tokenizer, row.prompt, spec.chat_template) for row in rows]
        version = self.engine.version
        generations = self.engine.generate(
            prompt_ids, spec.group_size, spec.temperature, spec.max_new_tokens, generation_seed(spec.seed, batch)
        )
        texts = [completion_text(self.tokenizer, g.completion_ids) for g in generations]
        calls = [row_call(rows[g.prompt_index], text) for g, text in zip(generations, texts, strict=True)]
        verdicts = self.verifier.score(calls)
        completions = [
            Completion(
                prompt_index=indices[g.prompt_index],
                prompt_ids=prompt_ids[g.prompt_index],
                completion_ids=g.completion_ids,
                logprobs=g.logprobs,
                reward=verdict.reward,
                truncated=g.truncated,
            )
            for g, verdict in zip(generations, verdicts, strict=True)
        ]
        rollouts = RolloutBatch(
            batch=batch, weight_version=version, group_size=spec.group_size, completions=completions
        )
        samples = [
            Sample(str(call.prompt), call.completion, str(call.columns["answer"]), verdict)
            for call, verdict in zip(calls, verdicts, strict=True)
        ]
        return Collected(rollouts, rollout_metrics(rollouts, verdicts), samples)


def row_call(row: Row, text: str) -> Call:
    """What the reward function is given for a completion of this row: all its columns, and `answer`."""
    return Call(row.prompt, text, {**row.columns, "answer": row.answer})


def generation_seed(seed: int, batch: int) -> int:
    """A seed of its own for each batch: neighbours of either number share nothing."""
    digest = hashlib.sha256(f"kedge rollouts {seed} {batch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def rollout_metrics(rollouts: RolloutBatch, verdicts: Sequence[Verdict]) -> dict[str, float]:
    """`reward_metrics` of the batch, `completions/eos_ratio`, and the counts `verifier/<outcome>`.

    `sampling/logprob_mean` is the mean log-prob of the sampled tokens: minus it estimates the entropy.
    """
    completions = rollouts.completions
    logprobs = [value for completion in completions for value in completion.logprobs]
    metrics = reward_metrics(rollouts)
    metrics["completions/eos_ratio"] = sum(not c.truncated for c in completions) / len(completions)
    metrics["sampling/logprob_mean"] = statistics.fmean(logprobs)
    for outcome in OUTCOMES:
        metrics[f"verifier/{outcome}"] = float(sum(verdict.outcome == outcome for verdict in verdicts))
    return metrics
