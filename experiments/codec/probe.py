"""What weights are worth, without sampling noise: exact accuracy, log-probs and gradients, through links or without. Trains nothing.

*Expected accuracy* of a problem is the probability that sampling at temperature 1 gives the right answer and ends: the
product of the model's probabilities of the answer's tokens and <eos>, each given those before it. Its mean over
problems is what sampling infinitely often would measure. Greedy decoding is right where each of them is the likeliest.

Legend: M completion tokens, V vocabulary, H hidden width, B sequences, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.codec.chain import Chain
from swarm_core.data.dataset import Row
from swarm_core.data.prompts import ChatTemplate, encode_prompt
from swarm_core.learning.batch import Batch, make_batch
from swarm_core.learning.microbatch import Sample, completion_rows
from swarm_core.manifest import Manifest
from swarm_core.wire.messages import BasisSet, Decide, Mode, Outcome
from swarm_worker.schedule import Stamp


@dataclass(frozen=True)
class Accuracy:
    """Shares of problems: `expected` when sampled at temperature 1, `greedy`."""

    expected: float
    greedy: float


@dataclass(frozen=True)
class Fidelity:
    """Compressed links against none, at the same weights and on the same batch.

    `kl` is the mean KL(dense || compressed) of the next-token distributions at completion positions, in nats;
    `largest_logp_shift` the largest change of a sampled token's log-prob; `gradient_cosine` one number a stage.
    """

    kl: float
    largest_logp_shift: float
    gradient_cosine: list[float]


class Probe:
    """A chain of its own, for rounds that leave the run's own state (sketches, deltas, gate) alone."""

    def __init__(self, manifest: Manifest, model_path: Path) -> None:
        self.chain = Chain(manifest, model_path)
        self._version = 0
        self._rounds = 0

    def set(self, weights: Mapping[str, Tensor], bases: BasisSet | None) -> None:
        """Measure these weights from now on, with these bases where the links have any."""
        self.chain.load_weights(weights)
        if bases is not None:
            self.chain.add_bases(bases)
            self._version = bases.version

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(logits_MV, targets_M) of a score round over the batch's only slice, microbatch after microbatch."""
        stamp = self._begin(batch, Mode.SCORE)
        last = self.chain.stages[-1]
        outputs: list[Tensor] = []
        hook = last.stage.register_forward_hook(lambda module, arguments, h_BTH: outputs.append(h_BTH.detach()))
        try:
            self.chain.score(stamp)
        finally:
            hook.remove()
        self._end(stamp)
        rows = [completion_rows(h_BTH, batch.layout(0, i)) for i, h_BTH in enumerate(outputs)]
        return torch.cat(rows) @ last.stage.lm_head_weight.detach().T, batch.targets_M

    def gradients(self, batch: Batch) -> list[Tensor]:
        """One flat gradient a stage, of a first tick over the batch's only slice."""
        stamp = self._begin(batch, Mode.TRAIN)
        self.chain.train(stamp)
        grads = [[parameter.grad for parameter in stage.parameters] for stage in self.chain.stages]
        self._end(stamp)
        return [torch.cat([grad.flatten() for grad in part if grad is not None]) for part in grads]

    def accuracy(self, problems: Batch) -> Accuracy:
        """Over a batch of `right_answers`."""
        logits_MV, targets_M = self.logits(problems)
        logp_M = logits_MV.log_softmax(-1).gather(1, targets_M[:, None])[:, 0].double()
        hit_M = (logits_MV.argmax(-1) == targets_M).double()
        lengths = problems.completion_lengths
        expected = [float(part.sum().exp()) for part in logp_M.split(lengths)]
        greedy = [float(part.min()) for part in hit_M.split(lengths)]
        return Accuracy(math.fsum(expected) / len(lengths), math.fsum(greedy) / len(lengths))

    def _begin(self, batch: Batch, mode: Mode) -> Stamp:
        """A round over the whole batch, which every stage sees for the first time: no delta has anything to refer to."""
        batch = Batch(**{name: value for name, value in vars(batch).items() if not name.startswith("_")})
        batch.number, batch.old_logprobs_M = self._rounds, None
        self._rounds += 1
        self.chain.add_batch(batch)
        (microbatches,) = batch.microbatches
        place = {"batch": batch.number, "tick": batch.number, "pass_": int(mode is Mode.TRAIN)}
        return Stamp(mode=mode, microbatches=microbatches, basis_version=self._version, **place)

    def _end(self, stamp: Stamp) -> None:
        """Nobody steps, and the batch is over."""
        for stage in self.chain.stages:
            stage.apply(stamp, Decide(outcome=Outcome.SKIP, end_of_batch=True))


def fidelity(dense: Probe, compressed: Probe, batch: Batch) -> Fidelity:
    """How far `compressed` is from `dense`; both hold the same weights."""
    (exact_MV, targets_M), (seen_MV, _) = dense.logits(batch), compressed.logits(batch)
    exact_MV, seen_MV = exact_MV.double().log_softmax(-1), seen_MV.double().log_softmax(-1)
    kl_M = (exact_MV.exp() * (exact_MV - seen_MV)).sum(-1)
    shift_M = (exact_MV - seen_MV).gather(1, targets_M[:, None]).abs()
    pairs = zip(dense.gradients(batch), compressed.gradients(batch), strict=True)
    cosines = [float(torch.cosine_similarity(a.double(), b.double(), dim=0)) for a, b in pairs]
    return Fidelity(float(kl_M.mean()), float(shift_M.max()), cosines)


def right_answers(
    tokenizer: Any, rows: Sequence[Row], eos_id: int, microbatch_size: int, template: ChatTemplate
) -> Batch:
    """Problems with their right answers as completions, <eos> included, in one slice."""
    samples = []
    for row in rows:
        prompt = torch.tensor(encode_prompt(tokenizer, row.prompt, template))
        answer = torch.tensor([*tokenizer(str(row.answer), add_special_tokens=False)["input_ids"], eos_id])
        samples.append(Sample(prompt, answer, 0.0, torch.zeros(len(answer))))
    return make_batch(0, 0, [samples], [sum(len(s.completion_ids) for s in samples)], [len(samples)], microbatch_size)
