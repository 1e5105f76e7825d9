"""The sampler engine that runs on plain transformers, on CPU or GPU. No text and no reward lives here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList

from swarm_worker.sampler.engine import Generation, Projection
from swarm_worker.sampler.errors import EngineError


class HfEngine:
    """`Engine` and `ProjectingEngine` over a Hugging Face causal language model.

    Prompts are padded on the left under an attention mask; the generation settings that the checkpoint ships with
    (penalties, top-k, top-p) are put aside, except for its set of end tokens, so that the log-probs are those of the
    distribution that was sampled. Checkpoints with tied embeddings are untied: lm_head becomes a tensor of its own.
    Sampling draws from torch's generator of the device under `fork_rng`: the state of the caller's is as it was.

    `sequences_per_call` bounds the memory: more completions than that are generated one slice after the other.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        version: int = 0,
        sequences_per_call: int = 256,
    ) -> None:
        if sequences_per_call < 1:
            raise EngineError(f"sequences_per_call is {sequences_per_call}, wanted at least 1")
        self.device = torch.device(device)
        self.dtype = dtype
        self.sequences_per_call = sequences_per_call
        self._version = version
        self._staged_version: int | None = None
        self._staged: dict[str, Tensor] = {}
        self._real_BT: Tensor | None = None
        model: Any = AutoModelForCausalLM
        self._model = model.from_pretrained(path, dtype=dtype).to(self.device).eval().requires_grad_(False)
        self.was_tied = _untie(self._model)
        self._parameters: dict[str, nn.Parameter] = dict(self._model.named_parameters())
        self.eos_ids = _end_tokens(self._model)
        self._pad_id = _pad_token(self._model, self.eos_ids)
        # A config of our own: transformers fills what a call leaves open from the one the model carries.
        self._model.generation_config = _settings(eos_token_id=sorted(self.eos_ids), pad_token_id=self._pad_id)

    @property
    def version(self) -> int:
        """Version of the weights that `generate` uses now."""
        return self._version

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self._model.model.layers)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """What a full set of weights consists of."""
        return tuple(self._parameters)

    @property
    def missing_names(self) -> frozenset[str]:
        """What the unfinished version still waits for; empty when there is none under way."""
        return frozenset(self._parameters) - frozenset(self._staged) if self._staged else frozenset()

    @torch.no_grad()
    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """See `Engine.load_weights`. Tensors are copied before this returns, and cast to the engine's dtype."""
        for name, tensor in state.items():
            parameter = self._parameters.get(name)
            if parameter is None:
                raise EngineError(f"weights of version {version}: this model has no tensor {name!r}")
            if parameter.shape != tensor.shape:
                raise EngineError(
                    f"weights of version {version}: {name!r} has shape {list(tensor.shape)}, "
                    f"wanted {list(parameter.shape)}"
                )
        if version != self._staged_version:
            self._staged.clear()
            self._staged_version = version
        if self._staged.keys() | state.keys() == self._parameters.keys():
            for name, tensor in (self._staged | dict(state)).items():
                self._parameters[name].copy_(tensor)
            self._version = version
            self._staged.clear()
            self._staged_version = None
            return
        for name, tensor in state.items():
            self._staged[name] = tensor.detach().to(self.device, self.dtype, copy=True)

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], n: int, temperature: float, max_new_tokens: int, seed: int
    ) -> list[Generation]:
        """See `Engine.generate`. Raises EngineError on an empty prompt or numbers out of range."""
        self._check_request(prompt_ids, n, temperature, max_new_tokens)
        order = [index for index in range(len(prompt_ids)) for _ in range(n)]
        generations: list[Generation] = []
        with _private_rng(self.device, seed):
            for first in range(0, len(order), self.sequences_per_call):
                indices = order[first : first + self.sequences_per_call]
                generations += self._generate_slice(prompt_ids, indices, temperature, max_new_tokens)
        return generations

    @contextlib.contextmanager
    def projected(self, projections: Mapping[int, Projection]) -> Iterator[None]:
        """See `ProjectingEngine.projected`. A projection gets h_NH in the engine's dtype and may answer in any float.

        The keys and values of later layers are made from the projected rows, in the prompt and token by token alike,
        so generation sees what a pipeline of stages with these links would. Raises EngineError on a key that is no
        boundary between two layers.
        """
        wrong = [key for key in projections if not 1 <= key < self.layers]
        if wrong:
            raise EngineError(f"no boundary {wrong}: wanted layer indices in [1, {self.layers - 1}]")
        decoder = self._model.model
        handles = [decoder.register_forward_pre_hook(self._note_real_tokens, with_kwargs=True)]
        try:
            for key, projection in projections.items():
                handles.append(decoder.layers[key - 1].register_forward_hook(self._projection_hook(projection)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._real_BT = None

    def _check_request(
        self, prompt_ids: Sequence[Sequence[int]], n: int, temperature: float, max_new_tokens: int
    ) -> None:
        if n < 1 or max_new_tokens < 1 or temperature < 0:
            raise EngineError(
                f"n={n}, max_new_tokens={max_new_tokens}, temperature={temperature}: "
                "wanted n >= 1, max_new_tokens >= 1, temperature >= 0"
            )
        longest = int(getattr(self._model.config, "max_position_embeddings", 0) or 0)
        for index, ids in enumerate(prompt_ids):
            if not ids:
                raise EngineError(f"prompt {index} has no token; wanted at least one")
            if longest and len(ids) + max_new_tokens > longest:
                raise EngineError(
                    f"prompt {index} has {len(ids)} tokens and may get {max_new_tokens} more, "
                    f"but the model reads {longest} at most; shorten the prompt or lower the completion length"
                )

    def _generate_slice(
        self, prompt_ids: Sequence[Sequence[int]], indices: list[int], temperature: float, max_new_tokens: int
    ) -> list[Generation]:
        """One call of transformers: `indices[b]` is the prompt of sequence b."""
        width = max(len(prompt_ids[index]) for index in indices)
        ids_BT = torch.full((len(indices), width), self._pad_id, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, index in enumerate(indices):
            length = len(prompt_ids[index])
            ids_BT[row, width - length :] = torch.tensor(prompt_ids[index])
            mask_BT[row, width - length :] = 1
        recorder = _LogprobRecorder(temperature or 1.0)
        greedy: dict[str, Any] = {"do_sample": False}
        sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        output_BT = self._model.generate(
            input_ids=ids_BT.to(self.device),
            attention_mask=mask_BT.to(self.device),
            logits_processor=LogitsProcessorList([recorder]),
            generation_config=_settings(
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(self.eos_ids),
                pad_token_id=self._pad_id,
                **(greedy if temperature == 0 else sampled),
            ),
        )
        tokens = output_BT[:, width:].tolist()
        logprobs = recorder.finish(output_BT).tolist()
        return [self._cut(index, row, logprobs[b]) for b, (index, row) in enumerate(zip(indices, tokens, strict=True))]

    def _cut(self, prompt_index: int, tokens: list[int], logprobs: list[float]) -> Generation:
        """Ends a completion behind its first end token; the pad token plays no part (it may be an end token itself)."""
        for place, token in enumerate(tokens):
            if token in self.eos_ids:
                return Generation(prompt_index, tokens[: place + 1], logprobs[: place + 1], truncated=False)
        return Generation(prompt_index, tokens, logprobs, truncated=True)

    def _note_real_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._real_BT = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _projection_hook(self, projection: Projection) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            h_BTD = output[0] if isinstance(output, tuple) else output
            batch, steps = h_BTD.shape[:2]
            if self._real_BT is None:
                real_BT = torch.ones(batch, steps, dtype=torch.bool, device=h_BTD.device)
            else:
                real_BT = self._real_BT[:, -steps:]  # with a cache the mask also covers the tokens before
            replaced_BTD = h_BTD.clone()
            replaced_BTD[real_BT] = projection(h_BTD[real_BT]).to(h_BTD.dtype)
            return (replaced_BTD, *output[1:]) if isinstance(output, tuple) else replaced_BTD

        return hook


class _LogprobRecorder(LogitsProcessor):
    """Keeps the log-prob of each sampled token without keeping the scores of more than one step (B x V).

    It is called with the raw logits of a step, before temperature, and with all ids so far: the last of them is the
    token that the step before has sampled.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._logits_BV: Tensor | None = None
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._settle(input_ids)
        self._logits_BV = scores.float()
        return scores

    def finish(self, output_BT: Tensor) -> Tensor:
        """logprobs_BC of all sampled tokens."""
        self._settle(output_BT)
        self._logits_BV = None
        return torch.stack(self._steps, dim=1)

    def _settle(self, ids_BT: Tensor) -> None:
        if self._logits_BV is not None:
            scaled_BV = self._logits_BV / self._temperature
            chosen_B = scaled_BV.gather(1, ids_BT[:, -1:])[:, 0]
            self._steps.append(chosen_B - scaled_BV.logsumexp(1))


def _settings(**values: Any) -> GenerationConfig:
    return GenerationConfig(**values)  # type: ignore[no-untyped-call]


def _untie(model: Any) -> bool:
    """Gives lm_head a copy of its own where it shares the embedding's tensor; says whether it did."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is not embedding.weight:
        return False
    head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    return True


def _end_tokens(model: Any) -> frozenset[int]:
    """The whole set of end tokens of the checkpoint's generation config (its model config where that has none)."""
    for config in (model.generation_config, model.config):
        value = getattr(config, "eos_token_id", None)
        if value is not None:
            return frozenset(int(token) for token in (value if isinstance(value, list | tuple) else [value]))
    raise EngineError("the checkpoint names no end token; add eos_token_id to its generation_config.json")


def _pad_token(model: Any, eos_ids: frozenset[int]) -> int:
    """Any valid id does: pads are masked in the prompt and cut behind the end token."""
    for config in (model.generation_config, model.config):
        value = getattr(config, "pad_token_id", None)
        if value is not None:
            return int(value)
    return min(eos_ids)


@contextlib.contextmanager
def _private_rng(device: torch.device, seed: int) -> Iterator[None]:
    """torch's generators of the CPU and of `device` seeded inside, and as they were outside."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], enabled=True):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
