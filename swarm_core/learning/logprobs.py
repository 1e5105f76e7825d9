"""Log-probabilities of given tokens from hidden states, in chunks. The loss, masks and sequences live elsewhere.

The logits of M completion tokens over a vocabulary of V are the largest tensor of a tick (8,192 x 152k in fp32 is 5
GB); no more than `chunk` rows of them exist at any time, in either direction. The backward pass computes each chunk's
logits again and lets autograd differentiate that one chunk, so a single chunk is the plain computation bit for bit,
in values and in gradients. Suffixes: M tokens, H width, V vocabulary, K rows of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swarm_core.learning.errors import LossError

DEFAULT_CHUNK = 1024  # rows; 1,024 x 152k fp32 logits are 0.6 GB, and the matmul is already at full speed


def token_logprobs(
    h_MH: Tensor, lm_head_weight_VH: Tensor, targets_M: Tensor, temperature: float = 1.0, chunk: int = DEFAULT_CHUNK
) -> tuple[Tensor, Tensor]:
    """log softmax(h W^T / temperature)[target] and the entropy of that distribution in nats -> (logp_M, entropy_M).

    `logp_M` is differentiable in `h_MH` and `lm_head_weight_VH`; `entropy_M` is detached (a metric). The projection
    runs in the dtype of the inputs; softmax, results and temperature are fp32 (fp64 for fp64 inputs).

    Raises: LossError for shapes that do not fit, a temperature <= 0 or a chunk < 1.
    """
    if h_MH.dim() != 2 or lm_head_weight_VH.dim() != 2 or h_MH.shape[1] != lm_head_weight_VH.shape[1]:
        raise LossError(
            "h_MH", f"got {tuple(h_MH.shape)} and weight {tuple(lm_head_weight_VH.shape)}, wanted (M, H) and (V, H)"
        )
    if tuple(targets_M.shape) != (h_MH.shape[0],):
        raise LossError("targets_M", f"got {tuple(targets_M.shape)}, wanted ({h_MH.shape[0]},), one a hidden row")
    if not temperature > 0:
        raise LossError("temperature", f"got {temperature}, wanted > 0: log-probs are taken as the sampler drew them")
    if chunk < 1:
        raise LossError("chunk", f"got {chunk}, wanted >= 1 row")
    apply: Any = _ChunkedLogprobs.apply  # untyped in torch
    logp_M, entropy_M = apply(h_MH, lm_head_weight_VH, targets_M, float(temperature), int(chunk))
    return logp_M, entropy_M


def _log_softmax_KV(h_KH: Tensor, weight_VH: Tensor, temperature: float) -> Tensor:
    logits_KV = h_KH @ weight_VH.T
    if logits_KV.dtype in (torch.bfloat16, torch.float16):
        logits_KV = logits_KV.float()
    if temperature != 1.0:
        logits_KV = logits_KV / temperature
    return torch.log_softmax(logits_KV, dim=-1)


class _ChunkedLogprobs(torch.autograd.Function):
    """Saves h, W and the targets only: never a logit."""

    @staticmethod
    def forward(
        ctx: Any, h_MH: Tensor, weight_VH: Tensor, targets_M: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if h_MH.dtype == torch.float64 else torch.float32
        logp_M = torch.empty(h_MH.shape[0], dtype=dtype, device=h_MH.device)
        entropy_M = torch.empty_like(logp_M)
        for start in range(0, h_MH.shape[0], chunk):
            rows = slice(start, start + chunk)
            logp_KV = _log_softmax_KV(h_MH[rows], weight_VH, temperature)
            logp_M[rows] = logp_KV.gather(1, targets_M[rows].unsqueeze(1)).squeeze(1)
            entropy_M[rows] = -(logp_KV.exp() * logp_KV).sum(dim=1)
        ctx.save_for_backward(h_MH, weight_VH, targets_M)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy_M)
        return logp_M, entropy_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        h_MH, weight_VH, targets_M = ctx.saved_tensors
        need_h, need_weight = ctx.needs_input_grad[:2]
        grad_h_MH = torch.empty_like(h_MH) if need_h else None
        grad_weight_VH: Tensor | None = None
        for start in range(0, h_MH.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            with torch.enable_grad():
                h_KH = h_MH[rows].detach().requires_grad_(need_h)
                weight = weight_VH.detach().requires_grad_(need_weight)
                logp_KV = _log_softmax_KV(h_KH, weight, ctx.temperature)
                logp_K = logp_KV.gather(1, targets_M[rows].unsqueeze(1)).squeeze(1)
            inputs = [tensor for tensor, needed in ((h_KH, need_h), (weight, need_weight)) if needed]
            grads = list(torch.autograd.grad(logp_K, inputs, grad_M[rows]))
            if grad_h_MH is not None:
                grad_h_MH[rows] = grads.pop(0)
            if need_weight:
                grad_weight_VH = _add(grad_weight_VH, grads[0])
        if need_weight:
            grad_weight_VH = torch.zeros_like(weight_VH) if grad_weight_VH is None else grad_weight_VH
            grad_weight_VH = grad_weight_VH.to(weight_VH.dtype)
        return grad_h_MH, grad_weight_VH, None, None, None


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    """Sum over chunks, in fp32 from the second one on: bf16 would round away the contributions of later chunks."""
    if total is None:
        return part
    if total.dtype in (torch.bfloat16, torch.float16):
        total = total.float()
    return total.add_(part)
