"""Probes: what the comparison of a compressed and a dense pass says, and that it says nothing where it cannot."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from codec.link_codec import LinkCodec
from codec.spec import Direction, LinkSpec
from swarm_worker import fidelity
from swarm_worker.fidelity import POISONED, Probe, divergence, exact, products
from swarm_worker.schedule import COMPRESSED, CROSSINGS, DENSE

H, V, M = 16, 40, 23


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def probe_over(link: LinkSpec, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Two linear stages and a head, forward and backward over the link and over an exact one."""
    g = generator(1)
    first, second, head = (torch.randn(n, H, generator=g).to(dtype) / 4 for n in (H, H, V))
    parameters = [[nn.Parameter(w)] for w in (first, second)]
    x_MH, targets_M = torch.randn(M, H, generator=g).to(dtype), torch.randint(V, (M,), generator=g)
    probes = [Probe(), Probe()]
    for crossing in range(CROSSINGS):
        codec = LinkCodec(link if crossing == COMPRESSED else exact(link))
        left_MH = (x_MH @ parameters[0][0]).tanh()
        entered_MH = codec.decode(codec.encode(left_MH, Direction.FORWARD), M, Direction.FORWARD)
        entered_MH = entered_MH.to(dtype).requires_grad_()
        hidden_MH = (entered_MH @ parameters[1][0]).tanh()
        probes[1].keep_hidden(crossing, hidden_MH)
        nn.functional.cross_entropy(hidden_MH @ head.T, targets_M).backward()
        assert entered_MH.grad is not None
        packet = codec.encode(entered_MH.grad, Direction.BACKWARD)
        left_MH.backward(codec.decode(packet, M, Direction.BACKWARD).to(dtype))
        for stage, probe in enumerate(probes):
            probe.keep_gradient(crossing, parameters[stage])
            assert parameters[stage][0].grad is None, "the tick's gradient must start from nothing"
    numbers = probes[0].compare(0) | probes[1].compare(1)
    return numbers | probes[1].compare_policies(head, targets_M, 0.7, chunk=7)


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_an_identity_link_is_faithful_to_the_last_bit(dtype: str) -> None:
    numbers = probe_over(LinkSpec("identity", H, dtype=dtype), torch.float32 if dtype == "fp32" else torch.float64)  # type: ignore[arg-type]
    assert numbers.pop("fidelity/grad_cosine/stage_0") == pytest.approx(1.0, abs=1e-15)
    assert numbers.pop("fidelity/grad_cosine/stage_1") == pytest.approx(1.0, abs=1e-15)
    assert numbers.pop("fidelity/grad_norm_ratio/stage_0") == numbers.pop("fidelity/grad_norm_ratio/stage_1") == 1.0
    assert numbers == {"fidelity/kl": 0.0, "fidelity/kl_max": 0.0, "fidelity/logp_diff_max": 0.0}


def test_a_bf16_link_is_nearly_faithful() -> None:
    numbers = probe_over(LinkSpec("none", H))
    for stage in range(2):
        assert 0.999 < numbers[f"fidelity/grad_cosine/stage_{stage}"] < 1.0
    assert 0.0 < numbers["fidelity/kl"] < numbers["fidelity/kl_max"] < 1e-3
    assert 1e-4 < numbers["fidelity/logp_diff_max"] < 0.1


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_the_divergence_is_torch_s_of_the_whole(temperature: float, chunk: int) -> None:
    g = generator(2)
    dense, compressed = (torch.randn(M, H, generator=g) for _ in range(2))
    head, targets = torch.randn(V, H, generator=g), torch.randint(V, (M,), generator=g)
    p, q = (torch.log_softmax(h.double() @ head.double().T / temperature, dim=1) for h in (dense, compressed))
    kl_M = nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(dim=1)
    taken = (p - q)[torch.arange(M), targets].abs()
    got = divergence(dense, compressed, head, targets, temperature, chunk)
    assert got["fidelity/kl"] == pytest.approx(float(kl_M.mean()), rel=1e-5)
    assert got["fidelity/kl_max"] == pytest.approx(float(kl_M.max()), rel=1e-5)
    assert got["fidelity/logp_diff_max"] == pytest.approx(float(taken.max()), rel=1e-5)


def test_products_are_those_of_all_tensors_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "PIECE", 11)
    g = generator(3)
    a: list[Tensor | None] = [torch.randn(5, 7, generator=g), None, torch.randn(3, generator=g), None]
    b: list[Tensor | None] = [torch.randn(5, 7, generator=g), torch.randn(40, generator=g), None, None]
    flat = [
        torch.cat([torch.zeros(n) if t is None else t.flatten() for t, n in zip(side, (35, 40, 3, 2), strict=True)])
        for side in (a, b)
    ]
    x, y = (t.double() for t in flat)
    assert products(a, b) == pytest.approx((float(x @ y), float(x @ x), float(y @ y)), rel=1e-12)


def test_opposite_and_longer_gradients_are_told_apart() -> None:
    probe, parameter = Probe(), nn.Parameter(torch.zeros(4))
    for crossing, scale in ((COMPRESSED, -3.0), (DENSE, 1.0)):
        parameter.grad = torch.arange(4.0) * scale
        probe.keep_gradient(crossing, [parameter])
    assert probe.compare(2) == pytest.approx(
        {"fidelity/grad_cosine/stage_2": -1.0, "fidelity/grad_norm_ratio/stage_2": 3.0}
    )


def test_a_stage_without_a_gradient_says_nothing() -> None:
    probe, parameter = Probe(), nn.Parameter(torch.zeros(4))
    for crossing in range(CROSSINGS):
        probe.keep_gradient(crossing, [parameter])
    assert probe.report(probe.compare(0)) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_poisoned_probe_says_only_that(value: float) -> None:
    probe, parameter = Probe(), nn.Parameter(torch.zeros(4))
    for crossing in range(CROSSINGS):
        parameter.grad = torch.tensor([1.0, value if crossing == DENSE else 1.0, 0.0, 0.0])
        probe.keep_gradient(crossing, [parameter])
    assert probe.report(probe.compare(0)) == {POISONED: 1.0}
    told = Probe()
    told.poisoned = True
    assert told.report({"fidelity/kl": 0.5}) == {POISONED: 1.0}
