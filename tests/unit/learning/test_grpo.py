"""The objective against TRL's own numbers, and the promises about microbatches, padding, masks and metrics."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swarm_core.learning.errors import LossError
from swarm_core.learning.grpo import Denominators, LossSpec, grpo_loss, merge_metrics
from swarm_core.learning.logprobs import token_logprobs
from swarm_core.learning.microbatch import Microbatch, Sample, completion_rows, from_samples, split_microbatches
from swarm_core.learning.rollout import Completion, RolloutBatch, to_samples

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "trl_grpo.json").read_text())
CASES = GOLDEN["cases"]
TRUNCATED = (3, 6)


def flat(rows: list[list[float]], keep: list[int] | None = None) -> Tensor:
    return torch.tensor([x for i, row in enumerate(rows) if keep is None or i in keep for x in row]).double()


def golden_spec(options: dict[str, Any]) -> LossSpec:
    return LossSpec(
        loss=options["loss_type"],
        clip_low=options.get("epsilon", 0.2),
        clip_high=options.get("epsilon_high", options.get("epsilon", 0.2)),
        dual_clip=options.get("delta"),
        beta=options.get("beta", 0.0),
        level=options.get("importance_sampling_level", "token"),
        tis_cap=GOLDEN["tis_cap"] if options.get("tis") else None,
        max_completion_length=GOLDEN["max_completion_length"],
        scale_rewards=options.get("scale_rewards", "group"),
        mask_truncated=options.get("mask_truncated_completions", False),
    )


def golden_samples(case: dict[str, Any]) -> list[Sample]:
    """All twelve completions as TRL had them: none dropped, its advantages, its loss mask."""
    samples = []
    for index, ids in enumerate(GOLDEN["completions"]):
        masked = case["options"].get("mask_truncated_completions", False) and index in TRUNCATED
        samples.append(
            Sample(
                torch.tensor(GOLDEN["prompts"][index // GOLDEN["group_size"]]),
                torch.tensor(ids),
                case["advantages"][index],
                torch.tensor(GOLDEN["sampler_logps"][index], dtype=torch.float64),
                torch.tensor(GOLDEN["old_logps"][index], dtype=torch.float64),
                torch.full((len(ids),), not masked),
            )
        )
    return samples


def golden_loss(
    samples: list[Sample], positions: list[int], spec: LossSpec, denominators: Denominators
) -> tuple[float, Tensor, dict[str, float]]:
    logp_M = flat(GOLDEN["logps"], positions).requires_grad_()
    loss, metrics = grpo_loss(
        logp_M,
        from_samples(samples),
        spec,
        denominators,
        flat(GOLDEN["ref_logps"], positions) if spec.beta else None,
        flat(GOLDEN["entropies"], positions),
    )
    loss.backward()
    assert logp_M.grad is not None
    return loss.item(), logp_M.grad, merge_metrics([metrics])


@pytest.mark.parametrize("name", sorted(CASES))
def test_loss_gradient_and_metrics_are_trls(name: str) -> None:
    case = CASES[name]
    spec, samples, everyone = golden_spec(case["options"]), golden_samples(case), list(range(12))
    # A completion without a reward stays in TRL's denominators; METHOD masks it. This test takes TRL's view of it.
    tokens = sum(int(s.mask_C.sum()) for s in samples if s.mask_C is not None)
    loss, grad_M, metrics = golden_loss(samples, everyone, spec, Denominators(tokens, len(samples)))
    assert loss == pytest.approx(case["loss"], abs=1e-7)
    torch.testing.assert_close(grad_M, flat(case["grad_logps"]), rtol=1e-6, atol=1e-9)
    assert grad_M.abs().max() > 1e-3
    compared = {n: v for n, v in case["metrics"].items() if not n.startswith(("reward", "frac"))}
    if spec.level == "sequence":
        assert compared["clip_ratio/region_mean"] > 0
    assert len(compared) >= 4
    assert {n: metrics[n] for n in compared} == pytest.approx(compared, abs=1e-6)


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_way_through_rollouts_gives_trls_gradient_although_it_drops_groups(name: str) -> None:
    case = CASES[name]
    spec = golden_spec(case["options"])
    rewards = case["options"].get("rewards", GOLDEN["rewards"])
    completions = [
        Completion(index // 4, GOLDEN["prompts"][index // 4], ids, GOLDEN["sampler_logps"][index], rewards[index],
                   index in TRUNCATED)
        for index, ids in enumerate(GOLDEN["completions"])
    ]  # fmt: skip
    samples, stats = to_samples(RolloutBatch(0, 0, 4, completions), spec)
    positions = list(stats.sample_positions)
    samples = [
        replace(s, old_logprobs_C=torch.tensor(GOLDEN["old_logps"][p], dtype=torch.float64))
        for s, p in zip(samples, positions, strict=True)
    ]
    if not spec.beta:
        assert stats.dropped_groups == 1 and not set(positions) & {8, 9, 10, 11}
    loss, grad_M, _ = golden_loss(samples, positions, spec, stats.denominators)
    # METHOD masks a completion without a reward, so its tokens leave the denominator; TRL keeps them in.
    unseen = sum(len(c.completion_ids) for c in completions if c.reward is None)
    scale = stats.denominators.tokens / (stats.denominators.tokens + unseen)
    assert loss * scale == pytest.approx(case["loss"], abs=1e-6)
    torch.testing.assert_close(grad_M * scale, flat(case["grad_logps"], positions), rtol=1e-5, atol=1e-7)
    left_out = [x for i, row in enumerate(case["grad_logps"]) if i not in positions for x in row]
    assert not any(left_out)
    wanted = {n: v for n, v in case["metrics"].items() if n.startswith(("reward", "frac"))}
    assert {n: stats.metrics[n] for n in wanted} == pytest.approx(wanted, abs=1e-6)


class TinyPolicy(nn.Module):
    """Causal: each position sees the mean of what came before it."""

    def __init__(self, dtype: torch.dtype, vocabulary: int = 23, width: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed = nn.Parameter(torch.randn(vocabulary, width, generator=generator).to(dtype))
        self.mix = nn.Parameter(torch.randn(width, width, generator=generator).to(dtype))
        self.head = nn.Parameter(0.3 * torch.randn(vocabulary, width, generator=generator).to(dtype))

    def forward(self, mb: Microbatch) -> tuple[Tensor, Tensor]:
        assert mb.ids_BT is not None
        h_BTD = self.embed[mb.ids_BT]
        counts_T = torch.arange(1, h_BTD.shape[1] + 1).view(1, -1, 1)
        h_BTD = torch.tanh((h_BTD.cumsum(1) / counts_T) @ self.mix) + h_BTD
        return token_logprobs(completion_rows(h_BTD, mb), self.head, mb.targets_M, temperature=0.9, chunk=16)


def tick_samples(dtype: torch.dtype, count: int = 8) -> list[Sample]:
    generator = torch.Generator().manual_seed(5)

    def made(index: int) -> Sample:
        prompt, completion = (torch.randint(1, 23, (n,), generator=generator) for n in (1 + index % 3, 1 + 2 * index))
        spread = 0.4 * torch.randn(2, len(completion), generator=generator, dtype=dtype)
        mask = torch.ones(len(completion), dtype=torch.bool)
        mask[3:5] = index != 4
        advantage = 0.0 if index == 2 else (-1.0) ** index * (0.5 + 0.1 * index)
        return Sample(prompt, completion, advantage, -3 + spread[0], -3 + spread[1], mask)

    return [made(index) for index in range(count)]


def accumulate(
    dtype: torch.dtype, samples: list[Sample], size: int, spec: LossSpec, denominators: Denominators
) -> tuple[float, Tensor, dict[str, float]]:
    policy, total, parts = TinyPolicy(dtype), 0.0, []
    for mb in split_microbatches(samples, size):
        logp_M, entropy_M = policy(mb)
        reference_M = torch.full_like(logp_M, -3.1) if spec.beta else None
        loss, metrics = grpo_loss(logp_M, mb, spec, denominators, reference_M, entropy_M)
        loss.backward()
        total += loss.item()
        parts.append(metrics)
    return total, torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]), merge_metrics(parts)


SPECS = {
    "dapo": LossSpec(),
    "grpo": LossSpec(loss="grpo", beta=0.1),
    "bnpo": LossSpec(loss="bnpo", tis_cap=None),
    "dr_grpo": LossSpec(loss="dr_grpo", max_completion_length=16),
    "gspo": LossSpec(loss="grpo", level="sequence", clip_low=0.01, clip_high=0.02),
    "dual": LossSpec(dual_clip=1.6, beta=0.05),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_ticks_gradient_does_not_depend_on_its_microbatches(name: str, dtype: torch.dtype, rtol: float) -> None:
    samples = tick_samples(dtype)
    denominators = Denominators(sum(int(s.mask_C.sum()) for s in samples if s.mask_C is not None) + 30, 12)
    one = accumulate(dtype, samples, 8, SPECS[name], denominators)
    for size in (4, 2, 1):
        loss, grad, metrics = accumulate(dtype, samples, size, SPECS[name], denominators)
        assert (grad - one[1]).norm() <= rtol * one[1].norm()
        assert loss == pytest.approx(one[0], rel=10 * rtol, abs=rtol)
        assert metrics == pytest.approx(one[2], rel=1e-5, abs=1e-6)
    assert one[1].norm() > 1e-3
    assert one[2]["clip_ratio/region_mean"] > 0


@pytest.mark.parametrize("name", SPECS)
def test_padding_does_not_matter(name: str) -> None:
    """A short sequence contributes the same alone and beside one that makes it mostly padding."""
    samples = tick_samples(torch.float64)
    short, long = samples[1], samples[7]
    denominators = Denominators(50, 8)
    together = accumulate(torch.float64, [short, long], 2, SPECS[name], denominators)
    apart = [accumulate(torch.float64, [s], 1, SPECS[name], denominators) for s in (short, long)]
    assert together[0] == pytest.approx(sum(part[0] for part in apart), rel=1e-13)
    torch.testing.assert_close(together[1], apart[0][1] + apart[1][1], rtol=1e-12, atol=1e-14)


def one_microbatch(advantages: list[float], length: int = 3, **columns: Any) -> Microbatch:
    samples = [
        Sample(torch.tensor([1]), torch.arange(length), a, torch.full((length,), -1.0, dtype=torch.float64))
        for a in advantages
    ]
    mb = from_samples(samples)
    return replace(mb, old_logprobs_M=torch.full((mb.layout.targets,), -1.0, dtype=torch.float64), **columns)


def test_without_old_logprobs_the_ratio_is_exactly_one() -> None:
    mb = replace(one_microbatch([1.0, -0.5]), old_logprobs_M=None)
    logp_M = torch.tensor([-0.123, -4.5, -2.0, -1.1, -7.7, -0.3], requires_grad=True)
    loss, raw = grpo_loss(logp_M, mb, LossSpec(tis_cap=None), Denominators(6, 2))
    loss.backward()
    assert loss.item() == pytest.approx(-(3 * 1.0 - 3 * 0.5) / 6)
    assert logp_M.grad is not None
    assert logp_M.grad.tolist() == pytest.approx([-1 / 6] * 3 + [0.5 / 6] * 3)
    metrics = merge_metrics([raw])
    assert metrics["clip_ratio/region_mean"] == 0.0 and metrics["policy/kl_old"] == 0.0


def test_inactive_tokens_cannot_influence_anything_even_when_not_finite() -> None:
    active_M = torch.tensor([True, True, False, True, True, False])
    mb = one_microbatch([1.0, -0.5], active_M=active_M)
    reference_M, seen = torch.full((6,), -1.5, dtype=torch.float64), []
    for poison in (-2.0, math.nan, -math.inf):
        logp_M = torch.tensor([-0.9, -1.4, poison, -1.1, -0.2, poison], dtype=torch.float64, requires_grad=True)
        sampler_M = torch.where(active_M, mb.sampler_logprobs_M, poison)
        part = replace(mb, sampler_logprobs_M=sampler_M)
        for spec in (LossSpec(beta=0.1), LossSpec(loss="grpo", level="sequence", beta=0.1)):
            loss, raw = grpo_loss(logp_M, part, spec, Denominators(4, 2), reference_M, -logp_M.detach())
            (grad,) = torch.autograd.grad(loss, logp_M)
            seen.append((loss.item(), grad.tolist(), merge_metrics([raw])))
    assert seen[0] == seen[2] == seen[4] and seen[1] == seen[3] == seen[5]
    assert seen[0][1][2] == seen[0][1][5] == 0.0


def test_a_fully_masked_sequence_costs_nothing_and_counts_as_a_sequence() -> None:
    active_M = torch.tensor([True] * 3 + [False] * 3)
    logp_M = torch.linspace(-2, -0.1, 6).double().requires_grad_()
    both = grpo_loss(logp_M, one_microbatch([1.0, 2.0], active_M=active_M), LossSpec(loss="grpo"), Denominators(3, 2))
    alone = grpo_loss(logp_M[:3], one_microbatch([1.0]), LossSpec(loss="grpo"), Denominators(3, 1))
    assert both[0].item() == pytest.approx(alone[0].item() / 2)
    nothing = grpo_loss(
        logp_M, one_microbatch([1.0, 2.0], active_M=torch.zeros(6, dtype=torch.bool)), LossSpec(), Denominators(0, 2)
    )
    assert nothing[0].item() == 0.0
    assert all(math.isfinite(value) for value in merge_metrics([nothing[1]]).values())


def test_dual_clip_stops_negative_advantages_where_plain_clipping_does_not() -> None:
    logp_M = torch.tensor([2.0, 2.0, 999.0], dtype=torch.float64, requires_grad=True)  # ratios e^3, e^3 and an overflow
    mb = one_microbatch([-1.0])
    plain, _ = grpo_loss(logp_M, mb, LossSpec(tis_cap=None), Denominators(3, 1))
    assert plain.item() > 1e30
    bounded, _ = grpo_loss(logp_M, mb, LossSpec(tis_cap=None, dual_clip=3.0), Denominators(3, 1))
    assert bounded.item() == pytest.approx(3.0)
    (grad,) = torch.autograd.grad(bounded, logp_M)
    assert grad.tolist() == [0.0, 0.0, 0.0]


def test_sequence_level_by_hand() -> None:
    logp_M = torch.tensor([-0.7, -1.0, -0.6], dtype=torch.float64, requires_grad=True)
    spec = LossSpec(loss="grpo", level="sequence", clip_low=0.5, clip_high=0.5, tis_cap=None)
    loss, _ = grpo_loss(logp_M, one_microbatch([2.0]), spec, Denominators(3, 1))
    ratio = math.exp((0.3 + 0.0 + 0.4) / 3)
    assert loss.item() == pytest.approx(-2 * ratio)
    (grad,) = torch.autograd.grad(loss, logp_M)
    assert grad.tolist() == pytest.approx([-2 * ratio / 3] * 3)


def test_a_token_without_a_sampler_logprob_is_not_corrected_and_counted() -> None:
    mb = one_microbatch([1.0])
    sampler_M = torch.tensor([math.nan, -3.0, -0.5], dtype=torch.float64)
    logp_M = torch.full((3,), -1.0, dtype=torch.float64, requires_grad=True)
    loss, raw = grpo_loss(logp_M, replace(mb, sampler_logprobs_M=sampler_M), LossSpec(), Denominators(3, 1))
    metrics = merge_metrics([raw])
    assert loss.item() == pytest.approx(-(1.0 + 2.0 + math.exp(-0.5)) / 3)  # e^2 is capped at 2
    assert metrics["sampling/missing_logprobs"] == 1
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(1.25)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(2.0)
    assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(math.exp(-0.5))
    off, raw = grpo_loss(logp_M, replace(mb, sampler_logprobs_M=sampler_M), LossSpec(tis_cap=None), Denominators(3, 1))
    assert off.item() == pytest.approx(-1.0)
    assert merge_metrics([raw])["sampling/importance_sampling_ratio/max"] == pytest.approx(math.exp(2.0))


def test_merging_metrics() -> None:
    parts = [{"a:sum": 1.0, "a:count": 2, "b:max": 3.0, "c:min": 1.0, "d:total": 0.5}, {"a:sum": torch.tensor(5.0)}]
    parts[1] |= {"a:count": torch.tensor(1), "b:max": -math.inf, "c:min": math.inf, "d:total": 0.25}
    assert merge_metrics(parts) == {"a": 2.0, "b": 3.0, "c": 1.0, "d": 0.75}
    assert merge_metrics([{"a:sum": 0.0, "a:count": 0, "b:max": -math.inf, "c:min": math.inf}]) == dict.fromkeys(
        "abc", 0.0
    )
    assert merge_metrics([]) == {}
    with pytest.raises(LossError, match="name:sum"):
        merge_metrics([{"reward": 1.0}])


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"loss": "ppo"}, "loss"),
        ({"level": "word"}, "level"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"dual_clip": 1.1}, "dual_clip"),
        ({"beta": -1.0}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"tis_cap": 0.0}, "tis_cap"),
        ({"loss": "dr_grpo"}, "max_completion_length"),
    ],
)
def test_impossible_specs_are_refused_by_name(options: dict[str, Any], field: str) -> None:
    with pytest.raises(LossError) as caught:
        LossSpec(**options)
    assert caught.value.field == field and "wanted" in str(caught.value)


def test_inputs_that_do_not_fit_are_refused_by_name() -> None:
    mb = one_microbatch([1.0])
    for arguments, field in [
        ((torch.zeros(2), mb, LossSpec(), Denominators(3, 1)), "logp_M"),
        ((torch.zeros(3), mb, LossSpec(beta=0.1), Denominators(3, 1)), "ref_logp_M"),
        ((torch.zeros(3), mb, LossSpec(), Denominators(3, 1), None, torch.zeros(1)), "entropy_M"),
    ]:
        with pytest.raises(LossError) as caught:
            grpo_loss(*arguments)  # type: ignore[arg-type]
        assert caught.value.field == field
    with pytest.raises(LossError, match="counts"):
        Denominators(-1, 0)
