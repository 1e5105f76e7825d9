"""Which layers each stage holds, by estimated work. Integers only: no tensor, no file, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from swarm_core.learning.errors import UnfitError

# Attention scores grow with the context; the split needs one typical length, not the real one. At 1024 tokens the
# quadratic part is a few percent of a layer for every supported family, so the value hardly moves a boundary.
TYPICAL_CONTEXT_TOKENS = 1024


class PartitionError(UnfitError):
    """The layers cannot be cut as asked."""


class LayerCounts(Protocol):
    """The numbers of a model that its cost depends on (`models.architecture.ModelShape` has them)."""

    @property
    def layers(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def vocab(self) -> int: ...


@dataclass(frozen=True)
class Span:
    """The layers `first_layer <= i < last_layer` on stage `stage` of `stages`.

    The first stage also holds the embedding, the last one the final norm and lm_head.
    """

    stage: int
    stages: int
    first_layer: int
    last_layer: int

    def __post_init__(self) -> None:
        if not 0 <= self.stage < self.stages:
            raise PartitionError(
                "span", f"stage {self.stage} of {self.stages}", "0 <= stage < stages", "count stages from 0"
            )
        if not 0 <= self.first_layer < self.last_layer:
            raise PartitionError(
                "span",
                f"layers {self.first_layer}..{self.last_layer}",
                "0 <= first_layer < last_layer (exclusive)",
                "give every stage at least one layer",
            )
        if (self.stage == 0) != (self.first_layer == 0):
            raise PartitionError(
                "span",
                f"stage {self.stage} from layer {self.first_layer}",
                "layer 0 on stage 0 and nowhere else",
                "build spans with partition()",
            )

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def layers(self) -> range:
        """The global indices of the layers held."""
        return range(self.first_layer, self.last_layer)


def whole(shape: LayerCounts) -> Span:
    """The span of a run with one stage."""
    return Span(0, 1, 0, shape.layers)


def layer_flops(shape: LayerCounts) -> int:
    """Forward FLOPs of one decoder layer for one token: two per weight, plus causal attention at a typical length."""
    attention_weights = 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)  # q, o and k, v
    mlp_weights = 3 * shape.hidden * shape.intermediate  # gate, up, down
    # Scores and their product with v are 4 FLOPs per (query, key, channel); a causal query sees half the context.
    scores = 2 * TYPICAL_CONTEXT_TOKENS * shape.heads * shape.head_dim
    return 2 * (attention_weights + mlp_weights) + scores


def head_flops(shape: LayerCounts) -> int:
    """Forward FLOPs of lm_head for one token. The embedding is a lookup and counts nothing."""
    return 2 * shape.hidden * shape.vocab


def stage_flops(shape: LayerCounts, span: Span) -> int:
    """Estimated forward FLOPs per token of one stage; the backward is twice that, on every stage alike."""
    return len(span.layers) * layer_flops(shape) + (head_flops(shape) if span.is_last else 0)


def partition(shape: LayerCounts, stages: int, split: Sequence[int] | None = None) -> list[Span]:
    """Cut the layers into `stages` contiguous spans with the smallest possible slowest stage.

    `split` gives the layers per stage and overrides the estimate. Pure integers: every process that has the shape
    computes the same cut. Raises PartitionError (more stages than layers, wrong split).
    """
    if stages < 1:
        raise PartitionError("stages", stages, "at least 1", "set the number of stages")
    if stages > shape.layers:
        raise PartitionError(
            "stages", f"{stages} stages for {shape.layers} layers", "stages <= layers", "use fewer stages"
        )
    counts = _balanced(shape, stages) if split is None else _checked(split, stages, shape.layers)
    spans, first = [], 0
    for stage, count in enumerate(counts):
        spans.append(Span(stage, stages, first, first + count))
        first += count
    return spans


def _checked(split: Sequence[int], stages: int, layers: int) -> list[int]:
    counts = list(split)
    if len(counts) != stages:
        raise PartitionError(
            "split", f"{len(counts)} numbers {counts}", f"{stages}, one per stage", "list the layers of each stage"
        )
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in counts):
        raise PartitionError("split", counts, "whole numbers >= 1", "give every stage at least one layer")
    if sum(counts) != layers:
        raise PartitionError(
            "split",
            f"{counts}, which is {sum(counts)} layers",
            f"{layers}, the model's layers",
            f"change it by {layers - sum(counts):+d}",
        )
    return counts


def _balanced(shape: LayerCounts, stages: int) -> list[int]:
    if stages == 1:
        return [shape.layers]
    layer, head, others = layer_flops(shape), head_flops(shape), stages - 1

    def cost(last: int) -> tuple[int, int]:
        """(slowest stage, sum of squares): the second part breaks ties toward the evenest cut."""
        each, extra = divmod(shape.layers - last, others)
        works = [each * layer] * (others - extra) + [(each + 1) * layer] * extra + [last * layer + head]
        return max(works), sum(work * work for work in works)

    last = min(range(1, shape.layers - others + 1), key=cost)
    each, extra = divmod(shape.layers - last, others)
    # The odd layers go to the later of the middle stages: stage 0 also holds the embedding and leads the tick.
    return [each] * (others - extra) + [each + 1] * extra + [last]
