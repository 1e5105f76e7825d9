"""A replay gives a tick's gradient once more: bit for bit without the codec, and with it as far as the anchor can know."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anchor_node.dense_replay import Cancelled, DenseReplay, Replayed, ReplayError
from codec import coefficients
from codec.basis import Basis
from codec.spec import Direction
from experiments.codec.training import Training
from swarm_core.config import load
from swarm_core.learning.batch import Batch
from swarm_core.learning.crossing import Crossing
from swarm_core.learning.stage import Stage, build_stage
from swarm_core.models.architecture import hf_config, read_shape
from swarm_core.models.reading import tensor_names
from swarm_worker.link_ends import LinkEnd, Packet
from swarm_worker.schedule import Stamp

CPU = torch.device("cpu")
TICKS = 4  # a batch of two slices, passed over twice
LOWRANK = {"kind": "lowrank", "rank_forward": 12, "rank_backward": 16, "reuse_deltas": False}
FIXED = {"q_cadence": 0, "calibration_prompts": 1}


@dataclass
class Tick:
    """What a tick was, at its own weights: a pair of the replay ring, and the gradient that the stages had."""

    stamp: Stamp
    weights: dict[str, Tensor]
    batch: Batch
    bases: dict[tuple[int, Direction], Basis]
    gradients: list[list[Tensor]]
    loss: float


class Observed(Training):
    """A training run that keeps all of its ticks."""

    def __init__(self, run_file: Path, folder: Path) -> None:
        super().__init__(load(run_file), folder)
        self.seen: list[Tick] = []
        train, stages = self.chain.train, self.chain.stages

        def watched(stamp: Stamp) -> Any:
            weights = {name: p.clone() for name, p in self.chain.weights().items()}
            last = stages[-1].batches[stamp.batch]
            kept = {"old_logprobs_M": last.old_logprobs_M, "reference_logprobs_M": last.reference_logprobs_M}
            batch = replace(stages[0].batches[stamp.batch], **kept).only(stamp.slice)
            bases = {key: b for s in stages for key, b in s.bases.get(stamp.basis_version, {}).items()}
            tallies = train(stamp)
            gradients = [[p.grad.clone() for p in s.parameters if p.grad is not None] for s in stages]
            self.seen.append(Tick(stamp, weights, batch, bases, gradients, tallies[-1].numbers["loss"]))
            return tallies

        self.chain.train = watched  # type: ignore[method-assign]
        self.run()
        self.close()
        assert len(self.seen) == self.manifest.config.run.ticks

    def opener(self, weights: dict[str, Tensor]) -> Callable[[int], Stage]:
        config, shape = hf_config(self.model_path), read_shape(self.model_path)

        def opened(number: int) -> Stage:
            span = self.manifest.spans[number]
            tensors = {name: weights[name].clone() for name in tensor_names(shape, span)}
            return build_stage(config, span, tensors, torch.float32)

        return opened

    def replay(self, tick: Tick, *, codec: bool, **options: Any) -> Replayed:
        made = DenseReplay(self.manifest, self.opener(tick.weights), CPU)
        return made.run(tick.batch, tick.bases, codec=codec, tick=tick.stamp.tick, **options)


@pytest.fixture
def observed(recipe: Callable[..., Any], tmp_path: Path) -> Callable[..., Observed]:
    def made(family: str = "llama", **sections: dict[str, Any]) -> Observed:
        sections = {"run": {"ticks": TICKS}, "swarm": {"microbatch_size": 6}} | sections
        return Observed(recipe(family).run_file(**sections), tmp_path / "observed")

    return made


def distance(got: list[list[Tensor]], wanted: list[list[Tensor]]) -> float:
    """||got - wanted|| / ||wanted|| over all stages."""
    a, b = (torch.cat([g.flatten().double() for part in gradients for g in part]) for gradients in (got, wanted))
    return float((a - b).norm() / b.norm())


def assert_same_bits(got: list[list[Tensor]], wanted: list[list[Tensor]]) -> None:
    assert [len(part) for part in got] == [len(part) for part in wanted] and wanted[0]
    assert all(torch.equal(a, b) for x, y in zip(got, wanted, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(
    ("family", "sections"),
    [
        ("llama", {}),
        ("qwen2", {"grpo": {"ratio_level": "sequence", "loss": "grpo", "kl_beta": 0.05, "temperature": 0.8}}),
        ("qwen3", {"run": {"ticks": TICKS, "precision": "bf16"}, "swarm": {"stages": 2, "logprob_chunk": 7}}),
        ("llama", {"swarm": {"stages": 1}}),
        ("llama", {"run": {"ticks": 2}, "grpo": {"ticks_per_pass": 1, "max_reuse": 1}}),
    ],
    ids=["plain", "kl-and-sequence-ratios", "bf16-compute", "one-stage", "single-use"],
)
def test_a_dense_replay_is_the_swarm_s_own_gradient_over_exact_links(
    family: str, sections: dict[str, Any], observed: Callable[..., Observed]
) -> None:
    run = observed(family, **sections)
    for tick in run.seen:
        assert tick.stamp.microbatches > 1
        replayed = run.replay(tick, codec=False)
        assert_same_bits(replayed.gradients, tick.gradients)
        assert replayed.metrics["loss"] == tick.loss
    if run.manifest.config.grpo.max_reuse > 1:
        assert replayed.metrics["policy/kl_old"] > 0, "the weights are those of the score pass"
    assert_same_bits(run.replay(tick, codec=True).gradients, tick.gradients)  # an exact link projects nothing


@pytest.mark.parametrize(
    "links",
    [
        {},
        {"backward": "exact", "gradient_scale": "row", "outliers": 2.0},
        {"stochastic_rounding": True, "share_prompts": False},
        {"quantiser_forward": "bf16", "quantiser_backward": "int8"},
        {"kind": "none"},
    ],
    ids=["straight-through", "exact", "stochastic", "bf16-and-int8", "rounded"],
)
def test_a_replay_through_the_codec_is_the_swarm_s_own_gradient(
    links: dict[str, Any], observed: Callable[..., Observed]
) -> None:
    run = observed("qwen3", links=LOWRANK | links, anchor=FIXED)
    assert run.manifest.config.links.shares_prompts == (links.get("kind") is None and links.get("share_prompts", True))
    for tick in run.seen:
        assert_same_bits(run.replay(tick, codec=True).gradients, tick.gradients)
    off = distance(run.replay(tick, codec=False).gradients, tick.gradients)
    assert off > 1e-3, "the codec changed nothing, so nothing was tested"


def test_with_reuse_deltas_only_the_row_scales_of_the_first_crossing_are_missing(
    observed: Callable[..., Observed], monkeypatch: pytest.MonkeyPatch
) -> None:
    scales, used = coefficients._codes, []

    def noting(spec: Any, direction: Direction, norms_N: Tensor, references: Any) -> Tensor:
        code_N = scales(spec, direction, norms_N, references)
        if references is not None:
            used.append(code_N.clone())
        return code_N

    monkeypatch.setattr(coefficients, "_codes", noting)
    run = observed("llama", links=LOWRANK | {"reuse_deltas": True}, anchor=FIXED)
    differ = 0
    for tick in run.seen:
        crossed = run.manifest.boundaries * tick.stamp.microbatches
        codes, used = used[:crossed], used[crossed:]  # microbatch by microbatch, and here boundary by boundary
        missing = [code_N for boundary in (0, 1) for code_N in codes[boundary::2]]
        monkeypatch.setattr(coefficients, "_codes", scales)
        plain = run.replay(tick, codec=True).gradients
        if tick is run.seen[0]:  # at the weights of its batch's score pass, which made the references
            assert_same_bits(plain, tick.gradients)
        differ += distance(plain, tick.gradients) > 0

        def told(
            spec: Any, direction: Direction, norms_N: Tensor, references: Any, left: list[Tensor] = missing
        ) -> Tensor:
            return left.pop(0) if direction is Direction.FORWARD else scales(spec, direction, norms_N, references)

        monkeypatch.setattr(coefficients, "_codes", told)
        assert_same_bits(run.replay(tick, codec=True).gradients, tick.gradients)
        assert not missing
    assert differ > 1 and not used


def test_sharing_prompts_changes_only_the_order_of_sums(observed: Callable[..., Observed]) -> None:
    run = observed("llama", links=LOWRANK, anchor=FIXED, run={"ticks": 1})
    tick = run.seen[-1]
    together = run.replay(tick, codec=False).gradients
    asked: list[bool] = []
    crossing = Batch.crossing

    def apart(self: Batch, slice_: int, microbatch: int, *, share: bool) -> Crossing:
        asked.append(share)
        return crossing(self, slice_, microbatch, share=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "crossing", apart)
        separate = run.replay(tick, codec=False).gradients
    assert all(asked) and 0.0 < distance(together, separate) < 1e-5


def test_one_stage_is_in_memory_at_a_time(observed: Callable[..., Observed]) -> None:
    run = observed(run={"ticks": 1})
    tick, opened = run.seen[-1], []
    open_stage = run.opener(tick.weights)

    def noting(number: int) -> Stage:
        assert all(stage() is None for _, stage in opened), "the stage before is still held"
        made = open_stage(number)
        opened.append((number, weakref.ref(made)))
        return made

    gc.disable()
    try:
        replayed = DenseReplay(run.manifest, noting, CPU).run(tick.batch, codec=False)
        assert [number for number, _ in opened] == [0, 1, 2, 1, 0]
        assert all(stage() is None for _, stage in opened)
    finally:
        gc.enable()
    assert_same_bits(replayed.gradients, tick.gradients)


def test_rows_and_their_gradients_are_shown_once_a_boundary_and_microbatch(
    observed: Callable[..., Observed], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[tuple[int, int, Direction, int], Tensor] = {}
    encode = LinkEnd.encode

    def noting(self: LinkEnd, x: Tensor, direction: Direction, stamp: Stamp, crossing: Any, m: int) -> Packet:
        sent[stamp.tick, self.boundary, direction, m] = x.detach().clone()
        return encode(self, x, direction, stamp, crossing, m)

    monkeypatch.setattr(LinkEnd, "encode", noting)
    run = observed(run={"ticks": 3})
    tick, shown = run.seen[2], []
    run.replay(tick, codec=False, watch=lambda *seen: shown.append(seen))
    count = tick.stamp.microbatches
    assert count > 1 and [boundary for boundary, _, _ in shown] == [1] * count + [0] * count
    for place, (boundary, rows_UH, grad_UH) in enumerate(shown):
        m = place % count
        assert torch.equal(rows_UH, sent[2, boundary, Direction.FORWARD, m]) and not rows_UH.requires_grad
        assert torch.equal(grad_UH, sent[2, boundary, Direction.BACKWARD, m])


def test_a_replay_can_be_stopped_before_every_microbatch(observed: Callable[..., Observed]) -> None:
    run = observed(run={"ticks": 1})
    tick, asked = run.seen[0], []
    run.replay(tick, codec=False, cancelled=lambda: bool(asked.append(None)))
    assert len(asked) == (2 * run.manifest.stages - 1) * tick.stamp.microbatches
    for at in (0, len(asked) // 2, len(asked) - 1):
        left = iter(range(at))
        with pytest.raises(Cancelled):
            run.replay(tick, codec=False, cancelled=lambda left=left: next(left, None) is None)


def test_a_slice_that_lacks_something_is_refused_before_any_stage_is_opened(
    observed: Callable[..., Observed],
) -> None:
    run = observed("llama", links=LOWRANK, anchor=FIXED, grpo={"kl_beta": 0.1}, run={"ticks": 1})
    (tick,) = run.seen

    def refused(what: str, *, codec: bool = False, bases: Any = None, **change: Any) -> None:
        replay = DenseReplay(run.manifest, lambda number: pytest.fail("a stage was opened"), CPU)
        with pytest.raises(ReplayError, match=what) as caught:
            replay.run(replace(tick.batch, **change), tick.bases if bases is None else bases, codec=codec)
        assert "\n" not in str(caught.value) and "wanted" in str(caught.value)

    n = len(tick.batch.prompts)
    refused("slices: got 2", slices=[0, 1, n], slice_tokens=[1, 1], slice_sequences=[1, 1])
    refused("token ids", ids_N=None)
    refused("old log-probs: got None", old_logprobs_M=None)
    refused("old log-probs: got NaN", old_logprobs_M=torch.full_like(tick.batch.old_logprobs_M, float("nan")))
    refused("grpo.kl_beta = 0.1: got None", reference_logprobs_M=None)
    held = {key: b for key, b in tick.bases.items() if key != (1, Direction.BACKWARD)}
    refused("none for boundary 1 backward", codec=True, bases=held)


def test_a_slice_without_signal_has_a_gradient_of_zero(observed: Callable[..., Observed]) -> None:
    run = observed("llama", run={"ticks": 1})
    (tick,) = run.seen
    batch = tick.batch
    empty = Batch(0, 0, 5, [], [], [], [0, 0], batch.targets_M[:0], [], batch.sampler_logprobs_M[:0],
                  batch.active_M[:0], [3], [4], ids_N=batch.ids_N[:0])  # fmt: skip
    replayed = run.replay(replace(tick, batch=empty), codec=False)
    assert [[g.shape for g in part] for part in replayed.gradients] == [
        [g.shape for g in part] for part in tick.gradients
    ]
    assert all(not g.any() for part in replayed.gradients for g in part)
