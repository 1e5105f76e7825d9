"""Validation accuracy of the sampler's weights, with and without the projections of compressed links.

Nothing is trained or recorded here.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swarm_core.data.dataset import Row
from swarm_core.data.prompts import ChatTemplate, completion_text, encode_prompt
from swarm_worker.sampler.collect import row_call
from swarm_worker.sampler.engine import ProjectingEngine, Projection
from swarm_worker.sampler.errors import SamplerError
from swarm_worker.sampler.verify import VerifierPool, failures


@dataclass(frozen=True)
class EvaluationSpec:
    """What is measured. The seed stays the same through a run, so that curves move with the weights alone."""

    temperature: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    samples_per_prompt: int = 1
    chat_template: ChatTemplate = "auto"
    right_from: float = 1.0
    """A completion is right when its reward is at least this."""


@dataclass(frozen=True)
class Evaluation:
    """`accuracy` is the share of right completions among all; one that the verifier failed on (`failed`) is not right.

    `standard_error` is that of the accuracy over prompts, and `mean_reward` is over judged completions only; `failures` says in words why others were not judged.
    """

    accuracy: float
    standard_error: float
    mean_reward: float | None
    completions: int
    failed: int
    mean_length: float
    truncated_share: float
    weight_version: int
    failures: str = ""


def evaluate(
    engine: ProjectingEngine,
    tokenizer: Any,
    rows: Sequence[Row],
    verifier: VerifierPool,
    spec: EvaluationSpec,
    *,
    projections: Mapping[int, Projection] | None = None,
) -> Evaluation:
    """Generates for every row, judges, counts.

    `projections` (boundary -> projection, see `ProjectingEngine.projected`) measures the compressed pipeline; None, or
    an empty one, the uncompressed weights. Raises SamplerError and its kinds, DataError.
    """
    if not rows or spec.samples_per_prompt < 1:
        raise SamplerError(f"{len(rows)} rows x {spec.samples_per_prompt} samples: nothing to evaluate")
    prompt_ids = [encode_prompt(tokenizer, row.prompt, spec.chat_template) for row in rows]
    version = engine.version
    with engine.projected(projections) if projections else contextlib.nullcontext():
        generations = engine.generate(
            prompt_ids, spec.samples_per_prompt, spec.temperature, spec.max_new_tokens, spec.seed
        )
    calls = [row_call(rows[g.prompt_index], completion_text(tokenizer, g.completion_ids)) for g in generations]
    verdicts = verifier.score(calls)
    rewards = [verdict.reward for verdict in verdicts]
    judged = [reward for reward in rewards if reward is not None]
    right = [float(reward is not None and reward >= spec.right_from) for reward in rewards]
    n = spec.samples_per_prompt
    per_prompt = [statistics.fmean(right[first : first + n]) for first in range(0, len(right), n)]
    spread = statistics.stdev(per_prompt) if len(per_prompt) > 1 else math.nan
    return Evaluation(
        accuracy=statistics.fmean(right),
        standard_error=spread / math.sqrt(len(per_prompt)),
        mean_reward=statistics.fmean(judged) if judged else None,
        completions=len(generations),
        failed=len(rewards) - len(judged),
        mean_length=statistics.fmean(len(g.completion_ids) for g in generations),
        truncated_share=sum(g.truncated for g in generations) / len(generations),
        weight_version=version,
        failures=failures(verdicts),
    )
