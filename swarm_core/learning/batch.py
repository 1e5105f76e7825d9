"""A rollout batch as a stage works on it: slices, their microbatches, and the log-probs it gathers. Pure.

A batch is cut into slices (one tick each); a slice into microbatches of whole sequences. The score pass walks the
microbatches of all slices in order, with the same composition as the ticks, so that an unchanged weight gives a ratio
of exactly 1. Suffixes: M completion tokens of all sequences of the batch, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from swarm_core.learning.crossing import Crossing, crossing
from swarm_core.learning.errors import MicrobatchError
from swarm_core.learning.microbatch import Layout, Microbatch, Sample, from_columns, pad_ids


@dataclass(eq=False)
class Batch:
    """The columns of a batch. Only sequences with signal are in it; the denominators count the others too.

    `slices` are the first sequences of each slice and the end; `prompts` number the prompts, equal ones alike. `ids_N`
    (all tokens, unpadded) is on stage 0 alone; `old_logprobs_M` and `reference_logprobs_M` fill up on the last stage
    during the forward-only rounds.
    """

    number: int
    weight_version: int
    microbatch_size: int
    prompts: list[int]
    prompt_lengths: list[int]
    completion_lengths: list[int]
    slices: list[int]
    targets_M: Tensor
    advantages: list[float]
    sampler_logprobs_M: Tensor
    active_M: Tensor
    slice_tokens: list[int]
    slice_sequences: list[int]
    ids_N: Tensor | None = None
    old_logprobs_M: Tensor | None = None
    reference_logprobs_M: Tensor | None = None

    def __post_init__(self) -> None:
        sequences = len(self.prompt_lengths)
        if not (
            len(self.completion_lengths) == len(self.advantages) == len(self.prompts) == sequences
            and self.slices
            and self.slices[0] == 0
            and self.slices[-1] == sequences
            and self.slices == sorted(self.slices)
            and len(self.slice_tokens) == len(self.slice_sequences) == len(self.slices) - 1
        ):
            raise MicrobatchError("batch", f"columns of batch {self.number} do not fit together")
        if len(set(zip(self.prompts, self.prompt_lengths, strict=True))) != len(set(self.prompts)):
            raise MicrobatchError("prompts", f"batch {self.number}: one prompt has two lengths")
        tokens = sum(self.completion_lengths)
        for name in ("targets_M", "sampler_logprobs_M", "active_M"):
            if getattr(self, name).numel() != tokens:
                raise MicrobatchError(name, f"got {getattr(self, name).numel()} values, wanted {tokens}")

    @cached_property
    def _ranges(self) -> list[list[range]]:
        """Per slice, the sequences of each microbatch."""
        size = self.microbatch_size
        bounds = zip(self.slices, self.slices[1:], strict=False)
        return [[range(a, min(a + size, end)) for a in range(start, end, size)] for start, end in bounds]

    @cached_property
    def _crossings(self) -> dict[tuple[int, int, bool], Crossing]:
        return {}

    @cached_property
    def _ends_M(self) -> list[int]:
        return [0, *torch.tensor(self.completion_lengths, dtype=torch.int64).cumsum(0).tolist()]

    @cached_property
    def _ends_N(self) -> list[int]:
        lengths = [p + c for p, c in zip(self.prompt_lengths, self.completion_lengths, strict=True)]
        return [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]

    @property
    def microbatches(self) -> tuple[int, ...]:
        """How many microbatches each slice has (0: no signal)."""
        return tuple(len(ranges) for ranges in self._ranges)

    def place(self, microbatch: int) -> tuple[int, int]:
        """(slice, microbatch) of the n-th microbatch of the whole batch, as the score pass counts."""
        for index, count in enumerate(self.microbatches):
            if microbatch < count:
                return index, microbatch
            microbatch -= count
        raise MicrobatchError("microbatch", f"batch {self.number} has no {microbatch} more microbatches")

    def layout(self, slice_: int, microbatch: int) -> Layout:
        """The lengths of one microbatch."""
        rows = self._ranges[slice_][microbatch]
        return Layout(tuple(self.prompt_lengths[i] for i in rows), tuple(self.completion_lengths[i] for i in rows))

    def crossing(self, slice_: int, microbatch: int, *, share: bool) -> Crossing:
        """Which rows of one microbatch cross a link; `share`: those of a prompt once for all its completions."""
        key = (slice_, microbatch, share)
        if key not in self._crossings:
            rows = self._ranges[slice_][microbatch]
            prompts = self.prompts[rows.start : rows.stop]
            self._crossings[key] = crossing(self.layout(slice_, microbatch), rows, prompts, share=share)
        return self._crossings[key]

    def ids(self, slice_: int, microbatch: int) -> Tensor:
        """ids_BT, right-padded (stage 0)."""
        if self.ids_N is None:
            raise MicrobatchError("ids_N", "only stage 0 holds the token ids")
        rows = self._ranges[slice_][microbatch]
        part = self.ids_N[self._ends_N[rows.start] : self._ends_N[rows.stop]]
        return pad_ids(part, self.layout(slice_, microbatch))

    def microbatch(self, slice_: int, microbatch: int) -> Microbatch:
        """Everything the loss needs of one microbatch (last stage)."""
        span = self._span_M(slice_, microbatch)
        rows = self._ranges[slice_][microbatch]
        return from_columns(
            self.layout(slice_, microbatch),
            self.targets_M[span],
            self.advantages[rows.start : rows.stop],
            self.sampler_logprobs_M[span],
            old_logprobs_M=None if self.old_logprobs_M is None else self.old_logprobs_M[span],
            active_M=self.active_M[span],
        )

    def reference(self, slice_: int, microbatch: int) -> Tensor | None:
        """Log-probs of the initial weights, when the KL penalty is on."""
        if self.reference_logprobs_M is None:
            return None
        return self.reference_logprobs_M[self._span_M(slice_, microbatch)]

    def probe(self, slice_: int, sequences: int) -> Batch:
        """A batch of its own, one slice and one microbatch, out of sequences spread evenly over a slice.

        Evenly, as a slice is in order of length. Its denominators are its own. Raises MicrobatchError for a slice
        without sequences.
        """
        first, end = self.slices[slice_], self.slices[slice_ + 1]
        n = min(sequences, end - first)
        if n < 1:
            raise MicrobatchError("probe", f"got {sequences} of {end - first} sequences of slice {slice_}, wanted one")
        picked = [first + (2 * i + 1) * (end - first) // (2 * n) for i in range(n)]

        def taken(column: Tensor, ends: list[int]) -> Tensor:
            return torch.cat([column[ends[i] : ends[i + 1]] for i in picked])

        old_M, reference_M = self.old_logprobs_M, self.reference_logprobs_M
        active_M = taken(self.active_M, self._ends_M)
        return replace(
            self,
            microbatch_size=n,
            prompts=[self.prompts[i] for i in picked],
            prompt_lengths=[self.prompt_lengths[i] for i in picked],
            completion_lengths=[self.completion_lengths[i] for i in picked],
            slices=[0, n],
            targets_M=taken(self.targets_M, self._ends_M),
            advantages=[self.advantages[i] for i in picked],
            sampler_logprobs_M=taken(self.sampler_logprobs_M, self._ends_M),
            active_M=active_M,
            slice_tokens=[int(active_M.sum())],
            slice_sequences=[n],
            ids_N=None if self.ids_N is None else taken(self.ids_N, self._ends_N),
            old_logprobs_M=None if old_M is None else taken(old_M, self._ends_M),
            reference_logprobs_M=None if reference_M is None else taken(reference_M, self._ends_M),
        )

    def only(self, slice_: int) -> Batch:
        """A batch of its own out of one slice: the same microbatches, denominators and log-probs, as slice 0.

        The columns are views. The keys of its crossings are other ones, so nothing of the whole batch is a reference.
        """
        first, end = self.slices[slice_], self.slices[slice_ + 1]
        rows_M, rows_N = slice(self._ends_M[first], self._ends_M[end]), slice(self._ends_N[first], self._ends_N[end])

        def taken(column: Tensor | None, rows: slice = rows_M) -> Tensor | None:
            return None if column is None else column[rows]

        return replace(
            self,
            prompts=self.prompts[first:end],
            prompt_lengths=self.prompt_lengths[first:end],
            completion_lengths=self.completion_lengths[first:end],
            slices=[0, end - first],
            targets_M=self.targets_M[rows_M],
            advantages=self.advantages[first:end],
            sampler_logprobs_M=self.sampler_logprobs_M[rows_M],
            active_M=self.active_M[rows_M],
            slice_tokens=[self.slice_tokens[slice_]],
            slice_sequences=[self.slice_sequences[slice_]],
            ids_N=taken(self.ids_N, rows_N),
            old_logprobs_M=taken(self.old_logprobs_M),
            reference_logprobs_M=taken(self.reference_logprobs_M),
        )

    def keep_old(self, slice_: int, microbatch: int, logprobs_M: Tensor) -> None:
        """Store the score pass' log-probs of one microbatch."""
        if self.old_logprobs_M is None:
            self.old_logprobs_M = logprobs_M.new_full((self._ends_M[-1],), float("nan"), device="cpu")
        self.old_logprobs_M[self._span_M(slice_, microbatch)] = logprobs_M.detach().cpu()

    def keep_reference(self, slice_: int, microbatch: int, logprobs_M: Tensor) -> None:
        """Store the initial weights' log-probs of one microbatch."""
        if self.reference_logprobs_M is None:
            self.reference_logprobs_M = logprobs_M.new_full((self._ends_M[-1],), float("nan"), device="cpu")
        self.reference_logprobs_M[self._span_M(slice_, microbatch)] = logprobs_M.detach().cpu()

    def _span_M(self, slice_: int, microbatch: int) -> slice:
        rows = self._ranges[slice_][microbatch]
        return slice(self._ends_M[rows.start], self._ends_M[rows.stop])


def make_batch(
    number: int,
    weight_version: int,
    slices: Sequence[Sequence[Sample]],
    slice_tokens: Sequence[int],
    slice_sequences: Sequence[int],
    microbatch_size: int,
    *,
    keep_groups: bool = False,
) -> Batch:
    """Stage 0's batch out of samples with signal, slice by slice.

    Within a slice sequences are ordered by length (a stable sort), so that a microbatch has little padding. With
    `keep_groups` it is whole groups that are ordered, by their longest member: more padding, and more rows that
    `crossing` can share.
    """
    numbers: dict[bytes, int] = {}
    prompt_of = {id(s): numbers.setdefault(s.prompt_ids.numpy().tobytes(), len(numbers)) for p in slices for s in p}
    ordered = [_by_length(part, prompt_of if keep_groups else None) for part in slices]
    samples = [sample for part in ordered for sample in part]
    ends = [0]
    for part in ordered:
        ends.append(ends[-1] + len(part))
    masks = [torch.ones_like(s.completion_ids) if s.mask_C is None else s.mask_C for s in samples]

    def joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        return torch.cat(parts).to(dtype) if parts else torch.empty(0, dtype=dtype)

    return Batch(
        number=number,
        weight_version=weight_version,
        microbatch_size=microbatch_size,
        prompts=[prompt_of[id(s)] for s in samples],
        prompt_lengths=[s.prompt_ids.numel() for s in samples],
        completion_lengths=[s.completion_ids.numel() for s in samples],
        slices=ends,
        targets_M=joined([s.completion_ids for s in samples], torch.int64),
        advantages=[s.advantage for s in samples],
        sampler_logprobs_M=joined([s.sampler_logprobs_C for s in samples], torch.float32),
        active_M=joined(masks, torch.bool),
        slice_tokens=list(slice_tokens),
        slice_sequences=list(slice_sequences),
        ids_N=joined([ids for s in samples for ids in (s.prompt_ids, s.completion_ids)], torch.int64),
    )


def _by_length(samples: Sequence[Sample], prompt_of: dict[int, int] | None) -> list[Sample]:
    """Shortest first; with `prompt_of`, groups of one prompt stay together."""
    length = {id(s): s.prompt_ids.numel() + s.completion_ids.numel() for s in samples}
    if prompt_of is None:
        return sorted(samples, key=lambda s: length[id(s)])
    longest: dict[int, int] = {}
    for s in samples:
        p = prompt_of[id(s)]
        longest[p] = max(longest.get(p, 0), length[id(s)])
    return sorted(samples, key=lambda s: (longest[prompt_of[id(s)]], prompt_of[id(s)]))
