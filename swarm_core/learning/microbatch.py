"""Samples, microbatches and the row bookkeeping between them. No model, no loss, no rewards: tensors and integers only.

Sequences are a prompt followed by a completion, padded on the right. Attention is purely causal, so pad positions never
influence real ones, and only real rows cross a link. Shape suffixes: B sequences, T padded width, N real tokens (rows
that cross a link), M completion tokens (rows that get a log-probability), C completion tokens of one sample, H width.

Who holds what: stage 0 has the token ids (`ids_BT`), middle stages need a `Layout` alone (lengths), and the last stage
has the completion ids as targets but never sees the ids of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from swarm_core.learning.errors import MicrobatchError


@dataclass(frozen=True, eq=False)
class Sample:
    """One completion to learn from.

    `prompt_ids` and `completion_ids` are int64, 1-D, both non-empty. `advantage` is the group-normalised advantage.
    `sampler_logprobs_C` are the sampler's log-probs of the completion at the sampling temperature (NaN where it had
    none). `old_logprobs_C` are the trainer's own at batch-start weights, None for a batch that sees a single tick.
    `mask_C` is True where a token takes part in the loss, None for all of them.

    Raises: MicrobatchError when shapes or dtypes disagree.
    """

    prompt_ids: Tensor
    completion_ids: Tensor
    advantage: float
    sampler_logprobs_C: Tensor
    old_logprobs_C: Tensor | None = None
    mask_C: Tensor | None = None

    def __post_init__(self) -> None:
        for field in ("prompt_ids", "completion_ids"):
            ids = getattr(self, field)
            if ids.dtype != torch.int64 or ids.dim() != 1 or ids.numel() == 0:
                raise MicrobatchError(field, f"got {ids.dtype} {tuple(ids.shape)}, wanted a non-empty 1-D int64 tensor")
        for field in ("sampler_logprobs_C", "old_logprobs_C", "mask_C"):
            column = getattr(self, field)
            if column is not None and column.shape != self.completion_ids.shape:
                raise MicrobatchError(
                    field,
                    f"got shape {tuple(column.shape)}, wanted one value a completion token: "
                    f"{tuple(self.completion_ids.shape)}",
                )


@dataclass(frozen=True)
class Layout:
    """The lengths of a microbatch: all that a middle stage needs to know. Hashable; index tensors are made on demand.

    Raises: MicrobatchError for an empty microbatch, unequal columns, or an empty prompt or completion (the first
    completion token is predicted by the last prompt token, so both must exist).
    """

    prompt_lengths: tuple[int, ...]
    completion_lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        got = (len(self.prompt_lengths), len(self.completion_lengths))
        if got[0] != got[1] or got[0] == 0:
            raise MicrobatchError("layout", f"got {got[0]} prompt and {got[1]} completion lengths, wanted equal, >= 1")
        shortest = min(*self.prompt_lengths, *self.completion_lengths)
        if shortest < 1:
            raise MicrobatchError("layout", f"got a length of {shortest}, wanted >= 1 for every prompt and completion")

    @property
    def sequences(self) -> int:
        """B."""
        return len(self.prompt_lengths)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Real tokens of each sequence: prompt + completion."""
        return tuple(p + c for p, c in zip(self.prompt_lengths, self.completion_lengths, strict=True))

    @property
    def width(self) -> int:
        """T."""
        return max(self.lengths)

    @property
    def tokens(self) -> int:
        """N, the rows that cross a link."""
        return sum(self.lengths)

    @property
    def targets(self) -> int:
        """M, the completion tokens."""
        return sum(self.completion_lengths)

    @cached_property
    def lengths_B(self) -> Tensor:
        return torch.tensor(self.lengths)

    @cached_property
    def valid_index_N(self) -> Tensor:
        """Flat indices into B*T of the real tokens, sequence by sequence."""
        width = self.width
        with torch.inference_mode(False):  # kept, so it must also serve a backward pass
            return torch.cat([torch.arange(n) + row * width for row, n in enumerate(self.lengths)])

    @cached_property
    def completion_index_M(self) -> Tensor:
        """Flat indices into B*T of the positions whose *next* token is a completion token."""
        width, pairs = self.width, zip(self.prompt_lengths, self.completion_lengths, strict=True)
        with torch.inference_mode(False):
            return torch.cat([torch.arange(c) + (row * width + p - 1) for row, (p, c) in enumerate(pairs)])

    @cached_property
    def sequence_M(self) -> Tensor:
        """The sequence (0..B-1) each completion token belongs to."""
        with torch.inference_mode(False):
            return torch.repeat_interleave(torch.arange(self.sequences), torch.tensor(self.completion_lengths))


@dataclass(frozen=True, eq=False)
class Microbatch:
    """What the last stage (and, through `ids_BT`, stage 0) needs of one microbatch. See the module for the suffixes.

    `advantages_M` is float32, one value a token; `active_M` is the boolean loss mask. `ids_BT` is None on every stage
    but the first. `old_logprobs_M` None means: the ratio is exactly 1 (the loss uses its own detached log-probs).
    """

    layout: Layout
    ids_BT: Tensor | None
    targets_M: Tensor
    advantages_M: Tensor
    active_M: Tensor
    sampler_logprobs_M: Tensor
    old_logprobs_M: Tensor | None = None

    def __post_init__(self) -> None:
        wanted = (self.layout.targets,)
        for field in ("targets_M", "advantages_M", "active_M", "sampler_logprobs_M", "old_logprobs_M"):
            column = getattr(self, field)
            if column is not None and tuple(column.shape) != wanted:
                raise MicrobatchError(field, f"got shape {tuple(column.shape)}, wanted {wanted} (completion tokens)")
        if self.active_M.dtype != torch.bool:
            raise MicrobatchError("active_M", f"got {self.active_M.dtype}, wanted torch.bool")
        box = (self.layout.sequences, self.layout.width)
        if self.ids_BT is not None and tuple(self.ids_BT.shape) != box:
            raise MicrobatchError("ids_BT", f"got shape {tuple(self.ids_BT.shape)}, wanted {box}")

    @property
    def lengths_B(self) -> Tensor:
        return self.layout.lengths_B

    @property
    def valid_index_N(self) -> Tensor:
        return self.layout.valid_index_N

    @property
    def completion_index_M(self) -> Tensor:
        return self.layout.completion_index_M

    @property
    def sequence_M(self) -> Tensor:
        return self.layout.sequence_M

    def to(self, device: torch.device | str) -> Microbatch:
        """The same microbatch with its tensors on `device` (index tensors follow the rows they are used on)."""
        return replace(
            self,
            ids_BT=None if self.ids_BT is None else self.ids_BT.to(device),
            targets_M=self.targets_M.to(device),
            advantages_M=self.advantages_M.to(device),
            active_M=self.active_M.to(device),
            sampler_logprobs_M=self.sampler_logprobs_M.to(device),
            old_logprobs_M=None if self.old_logprobs_M is None else self.old_logprobs_M.to(device),
        )


def from_columns(
    layout: Layout,
    targets_M: Tensor,
    advantages: Sequence[float],
    sampler_logprobs_M: Tensor,
    *,
    old_logprobs_M: Tensor | None = None,
    active_M: Tensor | None = None,
    ids_BT: Tensor | None = None,
) -> Microbatch:
    """A microbatch from what travels: flat completion columns and one advantage a *sequence*.

    Raises: MicrobatchError when a column does not fit the layout.
    """
    if len(advantages) != layout.sequences:
        raise MicrobatchError("advantages", f"got {len(advantages)}, wanted one a sequence: {layout.sequences}")
    advantages_B = torch.tensor(list(advantages), dtype=torch.float32)
    if not bool(torch.isfinite(advantages_B).all()):
        raise MicrobatchError("advantages", f"got {list(advantages)}, wanted finite values")
    return Microbatch(
        layout=layout,
        ids_BT=ids_BT,
        targets_M=targets_M,
        advantages_M=advantages_B.index_select(0, layout.sequence_M).to(targets_M.device),
        active_M=torch.ones_like(targets_M, dtype=torch.bool) if active_M is None else active_M.to(torch.bool),
        sampler_logprobs_M=sampler_logprobs_M,
        old_logprobs_M=old_logprobs_M,
    )


def from_samples(samples: Sequence[Sample]) -> Microbatch:
    """One microbatch of all `samples`, in order, ids right-padded with 0.

    Raises: MicrobatchError for no samples, or when some have old log-probs and others do not.
    """
    if not samples:
        raise MicrobatchError("samples", "got none, wanted at least one; a tick without samples has no microbatch")
    layout = Layout(tuple(s.prompt_ids.numel() for s in samples), tuple(s.completion_ids.numel() for s in samples))
    old = [s.old_logprobs_C for s in samples if s.old_logprobs_C is not None]
    if old and len(old) != len(samples):
        raise MicrobatchError(
            "old_logprobs_C", f"got them for {len(old)} of {len(samples)} samples, wanted all or none"
        )
    masks = [torch.ones_like(s.completion_ids) if s.mask_C is None else s.mask_C for s in samples]
    return from_columns(
        layout,
        torch.cat([s.completion_ids for s in samples]),
        [s.advantage for s in samples],
        torch.cat([s.sampler_logprobs_C for s in samples]),
        old_logprobs_M=torch.cat(old) if old else None,
        active_M=torch.cat([mask.to(torch.bool) for mask in masks]),
        ids_BT=pad_ids(torch.cat([ids for s in samples for ids in (s.prompt_ids, s.completion_ids)]), layout),
    )


def split_microbatches(samples: Sequence[Sample], microbatch_size: int) -> list[Microbatch]:
    """`samples` in order, `microbatch_size` sequences each, the last one possibly smaller. No samples: an empty list.

    Raises: MicrobatchError for a size below 1.
    """
    if microbatch_size < 1:
        raise MicrobatchError("microbatch_size", f"got {microbatch_size}, wanted >= 1 sequence")
    return [from_samples(samples[i : i + microbatch_size]) for i in range(0, len(samples), microbatch_size)]


def pad_ids(ids_N: Tensor, layout: Layout) -> Tensor:
    """Unpadded ids (as they travel) -> `ids_BT`, right-padded with 0."""
    if tuple(ids_N.shape) != (layout.tokens,):
        raise MicrobatchError("ids_N", f"got shape {tuple(ids_N.shape)}, wanted ({layout.tokens},) from the lengths")
    return unpack_rows(ids_N.unsqueeze(1), layout).squeeze(2)


def pack_rows(h_BTD: Tensor, rows: Layout | Microbatch) -> Tensor:
    """h_BTD -> h_NH: the real rows only, sequence by sequence. Differentiable."""
    layout = rows if isinstance(rows, Layout) else rows.layout
    box = (layout.sequences, layout.width)
    if h_BTD.dim() != 3 or tuple(h_BTD.shape[:2]) != box:
        raise MicrobatchError("h_BTD", f"got shape {tuple(h_BTD.shape)}, wanted {box} + (width,) from the lengths")
    return h_BTD.flatten(0, 1).index_select(0, layout.valid_index_N.to(h_BTD.device))


def unpack_rows(h_NH: Tensor, rows: Layout | Microbatch) -> Tensor:
    """h_NH -> h_BTD with zeros at the pad positions. Differentiable; the inverse of `pack_rows` on real rows."""
    layout = rows if isinstance(rows, Layout) else rows.layout
    if h_NH.dim() != 2 or h_NH.shape[0] != layout.tokens:
        raise MicrobatchError(
            "h_NH", f"got shape {tuple(h_NH.shape)}, wanted ({layout.tokens}, width) from the lengths"
        )
    flat = h_NH.new_zeros(layout.sequences * layout.width, h_NH.shape[1])
    flat = flat.index_copy(0, layout.valid_index_N.to(h_NH.device), h_NH)
    return flat.view(layout.sequences, layout.width, h_NH.shape[1])


def completion_rows(h_BTD: Tensor, rows: Layout | Microbatch) -> Tensor:
    """h_BTD -> h_MH: the rows that predict the completion tokens, in the order of `targets_M`. Differentiable."""
    layout = rows if isinstance(rows, Layout) else rows.layout
    return h_BTD.flatten(0, 1).index_select(0, layout.completion_index_M.to(h_BTD.device))
