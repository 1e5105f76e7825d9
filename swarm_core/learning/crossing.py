"""Which rows of a microbatch cross a link, in which order and under which keys. Integers and index tensors; no model, no codec.

Completions of one prompt repeat its rows: attention is causal, so the rows of the prompt are the same in each of them.
With `share` they cross once for all completions of the microbatch; the receiver repeats them, and the gradients of the
copies come back as their sum, which is the gradient of the one row that was sent (autograd of `index_select`).

Keys name the same rows on every pass over a batch, whatever microbatch they are in: what reuse deltas are kept under.
Legend: N real rows of a microbatch, U rows that cross.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swarm_core.learning.microbatch import Layout


@dataclass(frozen=True, eq=False)
class Crossing:
    """`parts` are (key, rows), in order; `sent_U` says which of the N rows each of them is, and `source_N` which of the U
    rows stands for each of the N. Both are None where all rows cross."""

    parts: tuple[tuple[int, int], ...]
    sent_U: Tensor | None = None
    source_N: Tensor | None = None

    @property
    def rows(self) -> int:
        """U."""
        return sum(rows for _, rows in self.parts)

    @property
    def repeated_rows(self) -> int:
        """N."""
        return self.rows if self.source_N is None else len(self.source_N)

    def leaving(self, rows_NH: Tensor) -> Tensor:
        """The rows that cross, U x H. Differentiable."""
        return rows_NH if self.sent_U is None else rows_NH.index_select(0, self.sent_U.to(rows_NH.device))

    def arrived(self, rows_UH: Tensor) -> Tensor:
        """All rows of the microbatch, N x H, from those that crossed. Differentiable."""
        return rows_UH if self.source_N is None else rows_UH.index_select(0, self.source_N.to(rows_UH.device))


def crossing(layout: Layout, sequences: Sequence[int], prompts: Sequence[int], *, share: bool) -> Crossing:
    """The crossing of a microbatch made of these sequences of a batch, whose prompts are numbered alike where they are
    equal. Sequence s has the key 2 s, the rows of prompt p, where they are shared, 2 p + 1."""
    if not share:
        return Crossing(tuple((2 * s, n) for s, n in zip(sequences, layout.lengths, strict=True)))
    parts: list[tuple[int, int]] = []
    sent: list[Tensor] = []
    source: list[Tensor] = []
    first_row: dict[int, int] = {}  # of a prompt, among the U
    row = at = 0  # of the sequence among the N; of the next row among the U
    for s, p, prompt, completion in zip(
        sequences, prompts, layout.prompt_lengths, layout.completion_lengths, strict=True
    ):
        if p not in first_row:
            first_row[p] = at
            parts.append((2 * p + 1, prompt))
            sent.append(torch.arange(row, row + prompt))
            at += prompt
        parts.append((2 * s, completion))
        sent.append(torch.arange(row + prompt, row + prompt + completion))
        source.append(torch.arange(first_row[p], first_row[p] + prompt))
        source.append(torch.arange(at, at + completion))
        at += completion
        row += prompt + completion
    return Crossing(tuple(parts), torch.cat(sent), torch.cat(source))
