"""Chunked log-probs: the plain computation, without ever holding all logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swarm_core.learning.errors import LossError
from swarm_core.learning.logprobs import token_logprobs

M, H, V = 50, 16, 211
GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "trl_grpo.json").read_text())


def inputs(dtype: torch.dtype, rows: int = M) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h_MH = torch.randn(rows, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VH = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return h_MH, weight_VH, torch.randint(V, (rows,), generator=generator), torch.randn(rows, generator=generator)


def plain(h_MH: Tensor, weight_VH: Tensor, targets_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits_MV = h_MH @ weight_VH.T
    if logits_MV.dtype == torch.bfloat16:
        logits_MV = logits_MV.float()
    logp_MV = torch.log_softmax(logits_MV / temperature, dim=-1)
    return torch.gather(logp_MV, 1, targets_M[:, None])[:, 0], -(logp_MV.exp() * logp_MV).sum(1)


def gradients(logp_M: Tensor, upstream_M: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((logp_M * upstream_M).sum(), leaves))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_chunk_is_the_plain_computation_bit_for_bit(dtype: torch.dtype, temperature: float) -> None:
    h_MH, weight_VH, targets_M, upstream_M = inputs(dtype)
    logp_M, entropy_M = token_logprobs(h_MH, weight_VH, targets_M, temperature, chunk=M)
    wanted_M, wanted_entropy_M = plain(h_MH, weight_VH, targets_M, temperature)
    assert torch.equal(logp_M, wanted_M) and torch.equal(entropy_M, wanted_entropy_M)
    assert logp_M.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for found, wanted in zip(
        gradients(logp_M, upstream_M, h_MH, weight_VH), gradients(wanted_M, upstream_M, h_MH, weight_VH), strict=True
    ):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("chunk", [1, 7, 25, 49, 1000])
def test_any_chunk_gives_the_same_values_and_gradients(chunk: int) -> None:
    h_MH, weight_VH, targets_M, upstream_M = inputs(torch.float64)
    logp_M, entropy_M = token_logprobs(h_MH, weight_VH, targets_M, 0.8, chunk)
    wanted_M, wanted_entropy_M = plain(h_MH, weight_VH, targets_M, 0.8)
    torch.testing.assert_close(logp_M, wanted_M, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(entropy_M, wanted_entropy_M, rtol=1e-13, atol=1e-13)
    found = gradients(logp_M, upstream_M, h_MH, weight_VH)
    for a, b in zip(found, gradients(wanted_M, upstream_M, h_MH, weight_VH), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_half_precision_weight_gradients_are_not_worn_away_by_many_chunks() -> None:
    h_MH, weight_VH, targets_M, _ = inputs(torch.bfloat16, rows=512)
    upstream_M = torch.ones(512)
    many, one = (
        gradients(token_logprobs(h_MH, weight_VH, targets_M, chunk=chunk)[0], upstream_M, weight_VH)[0]
        for chunk in (1, 512)
    )
    exact = [x.detach().double().requires_grad_() for x in (h_MH, weight_VH)]
    (wanted,) = gradients(plain(exact[0], exact[1], targets_M, 1.0)[0], upstream_M, exact[1])
    assert many.dtype == torch.bfloat16
    assert (many.double() - wanted).norm() < 1.5 * (one.double() - wanted).norm()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation has put out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_no_more_than_a_chunk_of_logits_exists_in_either_direction() -> None:
    h_MH, weight_VH, targets_M, upstream_M = inputs(torch.float32, rows=400)
    bound = max(8 * V, V * H, 400 * H)
    saved: list[int] = []
    with (
        LargestTensor() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t),
    ):
        logp_M, _ = token_logprobs(h_MH, weight_VH, targets_M, 0.9, chunk=8)
        (logp_M * upstream_M).sum().backward()
    assert largest.elements <= bound < 400 * V
    assert max(saved) <= bound
    with LargestTensor() as whole:  # the measure can fail
        token_logprobs(h_MH, weight_VH, targets_M, 0.9, chunk=400)[0].sum().backward()
    assert whole.elements >= 400 * V


def test_entropy_is_a_metric_without_gradient() -> None:
    h_MH, weight_VH, targets_M, _ = inputs(torch.float32)
    logp_M, entropy_M = token_logprobs(h_MH, weight_VH, targets_M)
    assert logp_M.requires_grad and not entropy_M.requires_grad
    uniform = token_logprobs(torch.zeros(3, H), weight_VH.detach(), torch.zeros(3, dtype=torch.int64))[1]
    assert uniform.tolist() == pytest.approx([torch.log(torch.tensor(float(V))).item()] * 3, rel=1e-6)


def test_only_the_asked_gradients_are_computed() -> None:
    h_MH, weight_VH, targets_M, upstream_M = inputs(torch.float64)
    whole = gradients(token_logprobs(h_MH, weight_VH, targets_M, chunk=16)[0], upstream_M, h_MH, weight_VH)
    frozen = token_logprobs(h_MH, weight_VH.detach(), targets_M, chunk=16)[0]
    assert torch.equal(gradients(frozen, upstream_M, h_MH)[0], whole[0])
    fixed = token_logprobs(h_MH.detach(), weight_VH, targets_M, chunk=16)[0]
    assert torch.equal(gradients(fixed, upstream_M, weight_VH)[0], whole[1])
    with torch.no_grad():
        assert not token_logprobs(h_MH, weight_VH, targets_M)[0].requires_grad


def test_no_rows_at_all() -> None:
    h_MH, weight_VH, targets_M, _ = inputs(torch.float32, rows=0)
    logp_M, entropy_M = token_logprobs(h_MH, weight_VH, targets_M)
    assert logp_M.shape == entropy_M.shape == (0,)
    logp_M.sum().backward()
    assert weight_VH.grad is not None and not weight_VH.grad.any()


def test_as_trl_computes_them_from_the_same_hidden_states() -> None:
    h_MH = torch.tensor([row for sequence in GOLDEN["hidden"] for row in sequence], requires_grad=True)
    weight_VH = torch.tensor(GOLDEN["lm_head"], requires_grad=True)
    targets_M = torch.tensor([token for ids in GOLDEN["completions"] for token in ids])
    logp_M, entropy_M = token_logprobs(h_MH, weight_VH, targets_M, GOLDEN["temperature"], chunk=10)
    wanted_M = torch.tensor([x for row in GOLDEN["logps"] for x in row])
    torch.testing.assert_close(logp_M.detach(), wanted_M, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(entropy_M, torch.tensor([x for row in GOLDEN["entropies"] for x in row]))
    upstream_M = torch.tensor([x for row in GOLDEN["cases"]["dapo"]["grad_logps"] for x in row])
    (found,) = gradients(logp_M, upstream_M, weight_VH)
    torch.testing.assert_close(found, torch.tensor(GOLDEN["grad_lm_head"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"chunk": 0}, "chunk"),
        ({"targets_M": torch.zeros(3, dtype=torch.int64)}, "targets_M"),
        ({"h_MH": torch.zeros(M, H + 1)}, "h_MH"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    h_MH, weight_VH, targets_M, _ = inputs(torch.float32)
    with pytest.raises(LossError) as caught:
        token_logprobs(**{"h_MH": h_MH, "lm_head_weight_VH": weight_VH, "targets_M": targets_M} | change)
    assert caught.value.field == field and "wanted" in str(caught.value)
