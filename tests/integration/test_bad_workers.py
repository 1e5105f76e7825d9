"""A worker that sends NaN, Inf, 1000 times, constants, or what it sent before: refused, bounded, or known to pass.

Two real stages in one process. What stage 0 sends forward, or stage 1 backward, is replaced by what a dishonest program
could send: honest packets of other numbers, or forged ones. docs/operations.md has the figures that are asserted here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from codec.basis import Basis
from codec.errors import PacketError, ReferenceMismatch
from codec.spec import Direction
from swarm_core.config import load
from swarm_core.learning import optimizer as optim
from swarm_core.learning.batch import make_batch
from swarm_core.learning.rollout import to_samples
from swarm_core.manifest import make_manifest
from swarm_core.models.architecture import fingerprint, read_shape
from swarm_core.wire.messages import Decide, Mode, Outcome
from swarm_worker.compute import StageCompute
from swarm_worker.sampler.replay import read_rollouts
from swarm_worker.schedule import Stamp

Recipe = Any
Rows = Callable[[Tensor], Tensor]
MAX_NORM = 0.5  # optimizer.max_grad_norm of the recipe
LINKS: dict[str, dict[str, Any]] = {
    "identity": {"kind": "identity"},
    "lowrank": {"kind": "lowrank", "rank_forward": 24, "rank_backward": 24, "outliers": 0.0, "zstd": "off"},
}


@dataclass
class Outcomes:
    """One tick, as stage 0 would decide it."""

    fault: str
    norms: list[float]
    gradients: list[Tensor] = field(repr=False)
    coefficient: float = 0.0
    moved: float = 0.0  # how far the weights went, of their norm

    @property
    def norm(self) -> float:
        return optim.total_norm(self.norms, torch.float32)


class Pair:
    """Stages 0 and 1, and the link between them in somebody's hands."""

    def __init__(self, recipe: Recipe, links: str) -> None:
        knobs = dict(LINKS[links])
        made = recipe.run_file(swarm={"stages": 2}, grpo={"ticks_per_pass": 1}, links=knobs, dgg={"enabled": True})
        manifest = make_manifest(load(made), read_shape(recipe.model), fingerprint(recipe.model))
        self.stages = [StageCompute(manifest, i, recipe.model, torch.device("cpu")) for i in range(2)]
        samples, stats = to_samples(next(read_rollouts(recipe.record, 4)), self.stages[0].loss_spec)
        counts = [stats.denominators.tokens], [stats.denominators.sequences]
        self.batch = make_batch(0, 0, [samples], *counts, 6, keep_groups=True)
        q_HR, _ = torch.linalg.qr(torch.randn(32, 24, generator=torch.Generator().manual_seed(1)))
        for stage in self.stages:
            stage.add_batch(self.batch)
            if links == "lowrank":
                stage.add_bases(0, {(0, d): Basis.orthonormal(0, q_HR.contiguous(), 0.05) for d in Direction})
        self.train = Stamp(microbatches=self.batch.microbatches[0], pass_=1)
        self.sent: dict[int, bytes] = {}  # activations of the newest tick
        self.returned: dict[int, bytes] = {}  # and gradients
        self.bad: dict[Direction, Rows] = {}
        self._plain = [self.stages[0].below.encode, self.stages[1].above.encode]  # type: ignore[union-attr]
        self.stages[0].below.encode = self._encode(0)  # type: ignore[union-attr,method-assign]
        self.stages[1].above.encode = self._encode(1)  # type: ignore[union-attr,method-assign]

    def _encode(self, stage: int) -> Any:
        def encode(x_UH: Tensor, direction: Direction, *rest: Any) -> Any:
            return self._plain[stage](self.bad.get(direction, lambda x: x)(x_UH.detach()), direction, *rest)

        return encode

    def score(self) -> None:
        stamp = replace(self.train, mode=Mode.SCORE, pass_=0)
        for i in range(stamp.microbatches):
            packet = self.stages[0].score(stamp, i, None)
            assert packet is not None
            self.stages[1].score(stamp, i, packet.payload)

    def tick(self, number: int = 0, forward: Callable[[int, bytes], bytes] = lambda i, p: p) -> Outcomes:
        """All of it but the vote's way to stage 0; `forward` may put another packet in place of each activation."""
        stamp = replace(self.train, tick=number, pass_=number + 1)
        for i in range(stamp.microbatches):
            packet = self.stages[0].forward(stamp, i, None)
            self.sent[i] = forward(i, packet.payload)
            answer = self.stages[1].loss(stamp, i, self.sent[i])
            assert answer is not None
            self.returned[i] = answer.payload
            self.stages[0].backward(stamp, i, answer.payload)
        tallies = [stage.tally(stamp) for stage in self.stages]
        fault = "; ".join(t.fault for t in tallies if t.fault)
        gradients = [p.grad.clone() for stage in self.stages for p in stage.parameters if p.grad is not None]
        made = Outcomes(fault, [n for t in tallies for n in t.norms], gradients)
        made.coefficient = optim.clip_coefficient(made.norms, MAX_NORM, torch.float32)
        before = [p.detach().clone() for stage in self.stages for p in stage.parameters]
        outcome = Outcome.SKIP if fault else Outcome.COMMIT
        for stage in self.stages:
            stage.apply(stamp, Decide(outcome, made.coefficient, reason="nonfinite" if fault else ""))
        after = [p.detach() for stage in self.stages for p in stage.parameters]
        made.moved = distance(before, after) / total(before)
        return made


def total(tensors: list[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack([t.norm() for t in tensors])))


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return total([x - y for x, y in zip(a, b, strict=True)])


def cosine(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True)) / (total(a) * total(b))


def pair(recipe: Callable[..., Recipe], links: str) -> Pair:
    made = Pair(recipe("llama", batches=1), links)
    made.score()
    return made


@pytest.mark.parametrize("links", LINKS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("direction", Direction)
def test_not_finite_by_mistake_is_a_fault_at_its_sender(
    recipe: Callable[..., Recipe], links: str, value: float, direction: Direction
) -> None:
    made = pair(recipe, links)
    made.bad[direction] = lambda x: x.index_fill(0, torch.tensor([0]), value) if float(x.abs().sum()) else x
    outcome = made.tick()
    assert outcome.fault.startswith(f"stage {int(direction)}, microbatch 0, tick 0 (train): ") and outcome.moved == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_on_purpose_is_refused_by_its_receiver(recipe: Callable[..., Recipe], value: float) -> None:
    made = pair(recipe, "identity")

    def forged(_i: int, packet: bytes) -> bytes:
        codec = made.stages[0].below.codec  # type: ignore[union-attr]
        rows = made.batch.crossing(0, 0, share=made.stages[0].share_prompts).rows
        honest = codec.decode(packet, rows, Direction.FORWARD)
        sealed = codec._sealed(
            memoryview(struct.pack("<f", value) * honest.numel()), codec._contents(rows, Direction.FORWARD, None)
        )
        return bytes(sealed)

    with pytest.raises(PacketError, match="NaN, Inf or out of range"):
        made.tick(forward=forged)


@pytest.mark.parametrize("links", LINKS)
def test_activations_of_1000_times_are_a_fault_and_no_weight_moves(recipe: Callable[..., Recipe], links: str) -> None:
    made = pair(recipe, links)
    assert made.tick().fault == ""
    made.bad[Direction.FORWARD] = lambda x: 1000 * x
    made.stages[0].below.forget()  # type: ignore[union-attr] # changes of 1000 times do not fit: it sends whole rows
    made.stages[1].above.forget()  # type: ignore[union-attr]
    for number in (1, 2):
        outcome = made.tick(number)
        assert outcome.fault.startswith(f"stage 1, tick {number}: activations of rms ") and outcome.moved == 0.0
    made.bad.clear()
    again = made.tick(3)
    assert again.fault == "" and again.moved > 0.0, "and the run goes on without it"


@pytest.mark.parametrize("links", LINKS)
def test_gradients_of_1000_times_pass_and_clipping_bounds_the_step(recipe: Callable[..., Recipe], links: str) -> None:
    honest = pair(recipe, links).tick()
    made = pair(recipe, links)
    made.bad[Direction.BACKWARD] = lambda g: 1000 * g
    outcome = made.tick()
    assert outcome.fault == "" and outcome.norm > 50 * honest.norm
    clipped = outcome.coefficient * outcome.norm
    print(f"{links}: norm {honest.norm:.3g} -> {outcome.norm:.3g}, moved {honest.moved:.2e} -> {outcome.moved:.2e}")
    assert clipped <= MAX_NORM * 1.001
    assert outcome.moved < 3 * honest.moved, "a step of Adam has the size of the learning rate, whatever the gradient's"


def test_constants_pass_and_what_they_do_is_known(recipe: Callable[..., Recipe]) -> None:
    honest = pair(recipe, "identity").tick()
    made = pair(recipe, "identity")
    made.bad[Direction.FORWARD] = lambda x: x[:1].expand_as(x)  # every token looks like the first
    outcome = made.tick()
    alike = cosine(outcome.gradients, honest.gradients)
    print(f"constants: cosine {alike:.3f}, norm {honest.norm:.3g} -> {outcome.norm:.3g}, moved {outcome.moved:.2e}")
    assert outcome.fault == "" and abs(alike) < 0.9
    assert outcome.moved < 3 * honest.moved


def test_packets_of_the_tick_before_are_told_by_their_references(recipe: Callable[..., Recipe]) -> None:
    made = pair(recipe, "lowrank")
    made.tick()  # at the weights of the score pass: its changes are zeros, and its packets fit before and after
    made.tick(1)
    old = dict(made.sent)
    with pytest.raises(ReferenceMismatch):
        made.tick(2, forward=lambda i, _packet: old[i])


def test_packets_of_the_tick_before_pass_where_there_are_no_references(recipe: Callable[..., Recipe]) -> None:
    honest, made = pair(recipe, "identity"), pair(recipe, "identity")
    for each in (honest, made):
        each.tick()
    old = dict(made.sent)
    plain, stale = honest.tick(1), made.tick(1, forward=lambda i, _packet: old[i])
    alike = cosine(stale.gradients, plain.gradients)
    print(f"stale: cosine {alike:.4f}, norm {plain.norm:.3g} -> {stale.norm:.3g}")
    assert stale.fault == "" and 0.0 < alike < 0.999
    assert stale.moved < 3 * plain.moved


def test_packets_of_another_microbatch_are_refused_where_their_rows_differ(recipe: Callable[..., Recipe]) -> None:
    made = pair(recipe, "identity")
    made.tick()
    old = dict(made.sent)
    with pytest.raises(PacketError, match="rows"):
        made.tick(1, forward=lambda i, _packet: old[(i + 1) % len(old)])
