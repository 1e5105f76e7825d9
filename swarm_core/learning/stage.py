"""One stage's layers as a module: forward only, autograd does the rest. No file, no link, no loss, no randomness."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swarm_core.learning.errors import UnfitError
from swarm_core.learning.partition import Span

# model_type -> transformers' class prefix; the module is transformers.models.<model_type>.modeling_<model_type>.
CLASS_PREFIX = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


class StageError(UnfitError):
    """A stage cannot be built or fed."""


class _Trunk(nn.Module):
    """Holds what transformers keeps under the name `model.`, so that parameter names are the checkpoint's."""


class Stage(nn.Module):
    """The layers `span.first_layer <= i < span.last_layer`, out of transformers' own classes of the family.

    Parameters carry their checkpoint names (`model.layers.3.mlp.up_proj.weight`, global layer numbers) in the order of
    the whole model's `named_parameters()`; the stages' names one after the other are the model's. A chain of stages
    gives bit for bit what the model gives in one piece, forward and backward (same kernels on the same shapes).

    Dropout is off whatever the config says: the old log-probs of a tick and its gradient must see one function.
    Right-padded batches need no mask: attention is causal, so a pad row influences only itself.
    Legend: B sequences, T positions, H hidden width, V vocabulary.
    """

    def __init__(self, config: Any, span: Span, *, recompute: bool = False) -> None:
        """Build on the meta device: no weight is allocated. `build_stage` gives it its tensors."""
        super().__init__()
        prefix, modeling = _family_classes(config)
        self.config: Any = copy.deepcopy(config)
        self.config._attn_implementation = "sdpa"
        self.config.attention_dropout = 0.0
        _check_span(self.config, span)
        self.span = span
        self.recompute = recompute
        with torch.device("meta"):
            self.model = _Trunk()
            if span.is_first:
                # padding_idx as in transformers: it decides which embedding row gets no gradient.
                self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
            layer_class = getattr(modeling, f"{prefix}DecoderLayer")
            self.model.layers = nn.ModuleDict({str(i): layer_class(self.config, i) for i in span.layers})
            if span.is_last:
                norm_class = getattr(modeling, f"{prefix}RMSNorm")
                self.model.norm = norm_class(config.hidden_size, eps=config.rms_norm_eps)
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Outside the meta context: these buffers are computed from the config and are in no checkpoint.
        with torch.device("cpu"):
            self.rotary: nn.Module = getattr(modeling, f"{prefix}RotaryEmbedding")(config=self.config)
        self._frequencies = {name: buffer.clone() for name, buffer in self.rotary.named_buffers()}
        self.eval()

    def forward(self, x: Tensor, *, cache: Any = None) -> Tensor:
        """`x` is ids_BT (int64) on the first stage, else h_BTH; returns h_BTH (after the final norm on the last stage).

        `cache` is a transformers Cache: positions continue after what it holds, and it is extended. Logits are
        `lm_head` of the result, left to the loss so that it can work in chunks. Raises StageError.
        """
        h_BTH = self._enter(x)
        past = 0 if cache is None else int(cache.get_seq_length(self.span.first_layer))
        length = h_BTH.shape[1]
        positions_1T = torch.arange(past, past + length, device=h_BTH.device).unsqueeze(0)
        rotary = self.rotary(h_BTH, positions_1T)
        mask = None
        if past and length > 1:  # sdpa's causal flag aligns to the first key; a later chunk needs its own mask
            keys_K = torch.arange(past + length, device=h_BTH.device)
            mask = (keys_K[None, :] <= positions_1T[0, :, None])[None, None]
        for layer in self.layers():
            h_BTH = self._run(layer, h_BTH, mask, positions_1T, rotary, cache)
        return cast(Tensor, self._part("norm")(h_BTH)) if self.span.is_last else h_BTH

    def layers(self) -> list[nn.Module]:
        """The decoder layers held, first to last."""
        return list(cast(nn.ModuleDict, self._part("layers")).values())

    def hf_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(checkpoint name, parameter) in the order of the whole model's `named_parameters()`."""
        return self.named_parameters()

    @property
    def lm_head_weight(self) -> nn.Parameter:
        """lm_head_VH, on the last stage only."""
        if not self.span.is_last:
            raise StageError(
                "lm_head", f"stage {self.span.stage} of {self.span.stages}", "the last stage", "ask that one"
            )
        return cast(nn.Parameter, self.lm_head.weight)

    def _enter(self, x: Tensor) -> Tensor:
        if self.span.is_first:
            if x.dim() != 2 or x.dtype not in (torch.int64, torch.int32):
                raise StageError("input of stage 0", _describe(x), "ids_BT int64", "pass token ids")
            return cast(Tensor, self._part("embed_tokens")(x))
        if x.dim() != 3 or x.shape[2] != self.config.hidden_size or not x.is_floating_point():
            raise StageError(
                f"input of stage {self.span.stage}",
                _describe(x),
                f"h_BTH float with H={self.config.hidden_size}",
                "pass the output of the stage before",
            )
        return x

    def _run(
        self, layer: nn.Module, h_BTH: Tensor, mask: Tensor | None, positions: Tensor, rotary: Any, cache: Any
    ) -> Tensor:
        def compute(h: Tensor) -> Tensor:
            return cast(
                Tensor,
                layer(
                    h,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=cache is not None,
                    position_embeddings=rotary,
                ),
            )

        if self.recompute and cache is None and torch.is_grad_enabled():
            # No random number is drawn in a layer, so there is no generator state to stash.
            return cast(Tensor, checkpoint(compute, h_BTH, use_reentrant=False, preserve_rng_state=False))
        return compute(h_BTH)

    def _part(self, name: str) -> nn.Module:
        return cast(nn.Module, getattr(self.model, name))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Stage:
        """Move or cast as usual, but keep the rotary frequencies: a bf16 cast would shift every position's angle."""
        cast(Callable[..., Any], super()._apply)(fn, recurse)  # untyped in torch
        for name, exact in self._frequencies.items():
            moved = cast(Tensor, getattr(self.rotary, name))
            device = torch.device("cpu") if moved.is_meta else moved.device
            setattr(self.rotary, name, exact.to(device, copy=True))
        return self


def build_stage(
    config: Any, span: Span, state_dict: Mapping[str, Tensor], dtype: torch.dtype, *, recompute: bool = False
) -> Stage:
    """A stage that owns the given tensors (they are taken over, not copied, when they already have `dtype`).

    `config` is transformers' config object (`models.architecture.hf_config`); this room opens no file. `recompute`
    keeps one activation per layer and computes the rest again in the backward: same bits, less memory, a third more
    work. Raises StageError (unknown family, sliding window, missing, unknown or misshapen tensor).
    """
    stage = Stage(config, span, recompute=recompute)
    wanted = dict(stage.named_parameters())
    missing = [name for name in wanted if name not in state_dict]
    unknown = [name for name in state_dict if name not in wanted]
    if missing or unknown:
        raise StageError(
            f"tensors of stage {span.stage} of {span.stages}",
            f"{len(missing)} missing {missing[:3]} and {len(unknown)} unknown {unknown[:3]}",
            f"exactly its {len(wanted)} tensors",
            "load them with models.reading.load_stage for the same span",
        )
    for name, parameter in wanted.items():
        if parameter.shape != state_dict[name].shape:
            raise StageError(
                f"tensor {name}", list(state_dict[name].shape), list(parameter.shape), "use this model's config"
            )
    stage.load_state_dict({name: tensor.detach().to(dtype) for name, tensor in state_dict.items()}, assign=True)
    return stage


def _family_classes(config: Any) -> tuple[str, Any]:
    family = getattr(config, "model_type", None)
    if family not in CLASS_PREFIX:
        raise StageError(
            "model config",
            f"{type(config).__name__} with model_type {family!r}",
            f"a transformers config of {' or '.join(CLASS_PREFIX)}",
            "read it with models.architecture.hf_config",
        )
    return CLASS_PREFIX[family], importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def _check_span(config: Any, span: Span) -> None:
    total = int(config.num_hidden_layers)
    if span.last_layer > total or (span.is_last and span.last_layer != total):
        raise StageError(
            f"span of stage {span.stage} of {span.stages}",
            f"layers {span.first_layer}..{span.last_layer - 1}",
            f"a cut of {total} layers",
            "build spans with partition() from this model's shape",
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise StageError("model config", sorted(kinds), "full attention in every layer", "choose another model")


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} of shape {list(x.shape)}"
