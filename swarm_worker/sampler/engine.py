"""What a generation engine promises, whatever runs it. Types only: no model, no tokenizer, no reward lives here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Projection = Callable[[Tensor], Tensor]
"""h_NH of N real tokens -> h_NH as the receiver of a link would rebuild it; rows are independent of each other."""


@dataclass(frozen=True)
class Generation:
    """One completion.

    `prompt_index` counts in the list given to `generate`. `completion_ids` holds the sampled tokens, the end token
    included and nothing after it. `logprobs[i]` is the log-probability of `completion_ids[i]` at the sampling
    temperature, under the weights that sampled it. `truncated`: the token limit came before an end token.
    """

    prompt_index: int
    completion_ids: list[int]
    logprobs: list[float]
    truncated: bool


class Engine(Protocol):
    """Generates completions from token ids; knows no text and no reward."""

    @property
    def version(self) -> int:
        """Version of the weights that `generate` uses now."""
        ...

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Takes tensors of weight version `version`, under their Hugging Face names; embedding and lm_head are two.

        The tensors of a version may come in several calls (one per stage). Until the last of them is here, `generate`
        goes on with the version before: weights of two versions are never mixed. Tensors of another version drop the
        unfinished one. Raises EngineError, and changes nothing, on an unknown name or another shape.
        """
        ...

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], n: int, temperature: float, max_new_tokens: int, seed: int
    ) -> list[Generation]:
        """`n` completions of each prompt, those of one prompt side by side, prompts in the order given.

        Samples from the whole distribution (no top-k, no top-p, no penalties). Temperature 0 is greedy; its log-probs
        are those at temperature 1. The same arguments, weights and engine settings give the same completions.
        """
        ...


class ProjectingEngine(Engine, Protocol):
    """An engine that can also run as the compressed pipeline would."""

    def projected(self, projections: Mapping[int, Projection]) -> AbstractContextManager[None]:
        """While the context is open, the output of layers `[0, k)` goes through `projections[k]` for real tokens.

        k is the (exclusive) last layer of a stage, so the key of the boundary behind it.
        """
        ...
