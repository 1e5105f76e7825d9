"""The gradient of one slice at given weights, once more: all stages in one process, one of them in memory at a time. No stream, no file.

A tick s is replayed at its weights theta_s on the very slice that it consumed. Without the codec that is M_s, the dense
gradient; with the codec it is G_comp(s), what the swarm itself obtained. Forward, stage by stage, only the rows that
cross each boundary are kept, on the CPU; backward, in reverse order, each stage computes its forward again from the rows
that entered it. A stage is opened twice, the last one once, and is gone before the next one is opened.

At the exact weights, M_s is the swarm's own gradient over identity links, and G_comp(s) the swarm's own, both bit for bit
(on a CPU), with one exception: with reuse deltas a row keeps the scale of its first crossing, at the weights its batch
began with, and here it gets that of theta_s. On the tiny example 2 to 7 % of the rows then have another one, and G_comp(s)
is 1 to 26 % off after a batch's first tick; M_s - G_comp(s) has a cosine of 0.91 or more with that of the swarm's own.

Suffixes: U rows of a microbatch that cross a link (learning/crossing.py), H hidden width, B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from codec.basis import Basis
from codec.link_codec import LinkCodec
from codec.spec import Direction
from swarm_core.errors import KedgeError
from swarm_core.learning.batch import Batch
from swarm_core.learning.crossing import Crossing
from swarm_core.learning.grpo import merge_metrics
from swarm_core.learning.microbatch import pack_rows, unpack_rows
from swarm_core.learning.objective import Objective, make_objective, packet_seed
from swarm_core.learning.stage import Stage
from swarm_core.manifest import Manifest
from swarm_core.wire.bases import Key

# (boundary, rows that arrived there U x H, the loss' gradient in them), once a microbatch, on the replay's device
Watch = Callable[[int, Tensor, Tensor], None]


class ReplayError(KedgeError):
    """A slice that cannot be replayed. Fields: what, got, wanted, todo."""

    def __init__(self, what: str, got: object, wanted: object, todo: str) -> None:
        super().__init__(f"replay, {what}: got {got}, wanted {wanted}; {todo}")
        self.what, self.got, self.wanted, self.todo = what, got, wanted, todo


class Cancelled(KedgeError):
    """The replay was told to stop. Nothing of it is kept."""

    def __init__(self) -> None:
        super().__init__("the replay was cancelled")


@dataclass(frozen=True)
class Replayed:
    """`gradients`, a list a stage in the order of its parameters, on the CPU in the master weights' dtype, zeros where
    nothing came; `metrics` of the loss, under the names that a tick reports."""

    gradients: list[list[Tensor]]
    metrics: dict[str, float]


class DenseReplay:
    """Replays slices of one run. `open_stage(i)` gives stage i with the weights to replay at; what it gives is taken over.

    At its peak a replay holds one stage's weights and gradient and the graph of one microbatch on `device`; and on the
    CPU the rows of every boundary, fp32, and the gradients of the stages that are done.
    """

    def __init__(self, manifest: Manifest, open_stage: Callable[[int], Stage], device: torch.device) -> None:
        self.manifest = manifest
        self.objective = make_objective(manifest.config, device)
        self._open_stage = open_stage

    def run(
        self,
        batch: Batch,
        bases: Mapping[Key, Basis] | None = None,
        *,
        codec: bool,
        tick: int = 0,
        watch: Watch | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Replayed:
        """The gradient of a batch of one slice (`Batch.only`) with its ids and old log-probs, as the tick summed it up.

        `codec`: rows and gradients cross every boundary as the links have it, in `bases`, those the batch was pinned
        to; `tick` is then the one replayed, which seeds stochastic rounding. `cancelled` is asked before every
        microbatch. Raises ReplayError, Cancelled, with `codec` NonFiniteError, and what `open_stage` raises.
        """
        self._check(batch)
        links = _Links(self.manifest, bases or {}, self.objective.device, tick) if codec else None
        work = _Replay(self.objective, batch, self.manifest.config.links.shares_prompts, links, watch, cancelled)
        stages = self.manifest.stages
        for i in range(stages - 1):
            work.forward(self._opened(i))
        gradients = [work.loss(self._opened(stages - 1))]
        for i in reversed(range(stages - 1)):
            gradients.append(work.backward(self._opened(i)))
        return Replayed(gradients[::-1], merge_metrics(work.metrics))

    def needed(
        self,
        batch: Batch,
        bases: Mapping[Key, Basis] | None,
        *,
        tick: int,
        watch: Watch | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[list[Tensor]]:
        """What corrections are made of, a list a stage: M, or for `held_delta` M - G_comp. Arguments and errors of `run`."""
        dense = self.run(batch, codec=False, tick=tick, watch=watch, cancelled=cancelled).gradients
        if self.manifest.config.corrections.merger == "held_delta":
            compressed = self.run(batch, bases, codec=True, tick=tick, cancelled=cancelled).gradients
            for m, g in zip(dense, compressed, strict=True):
                torch._foreach_sub_(m, g)
        return dense

    def _opened(self, number: int) -> Stage:
        return self._open_stage(number).to(self.objective.device, self.objective.dtype)

    def _check(self, batch: Batch) -> None:
        g = self.manifest.config.grpo
        if len(batch.slices) != 2:
            raise ReplayError("slices", len(batch.slices) - 1, "one", "cut it out with Batch.only")
        if batch.ids_N is None:
            raise ReplayError("token ids", None, "those of all sequences", "ship them from stage 0 with the slice")
        old_M = batch.old_logprobs_M
        if old_M is None and g.ticks_per_pass * g.max_reuse > 1 and batch.advantages:
            todo = "ship those of the last stage with the slice"
            raise ReplayError("old log-probs", None, "one a completion token, as the batch was scored", todo)
        if old_M is not None and bool(old_M.isnan().any()):
            raise ReplayError("old log-probs", "NaN", "finite ones", "ship them after the score pass is over")
        if g.kl_beta > 0 and batch.reference_logprobs_M is None and batch.advantages:
            todo = "ship those of the last stage with the slice, or set grpo.kl_beta = 0"
            raise ReplayError(f"reference log-probs, with grpo.kl_beta = {g.kl_beta}", None, "them", todo)


class _Links:
    """Every boundary's link at both ends: what a receiver sees of rows, without their bytes."""

    def __init__(self, manifest: Manifest, bases: Mapping[Key, Basis], device: torch.device, tick: int) -> None:
        self._spec = manifest.link()
        self._codec = LinkCodec(self._spec)
        self._place = manifest.config.run.seed, tick, 0  # the lead tries no tick twice
        used = {self._spec.basis_direction(d) for d in Direction} - {None}
        wanted = {(b, d) for b in range(manifest.boundaries) for d in used if d is not None}
        missing = sorted(f"boundary {b} {d.name.lower()}" for b, d in wanted - set(bases))
        if missing:
            raise ReplayError(
                "bases", f"none for {', '.join(missing)}", "one each", "keep those of the slice's version"
            )
        on_device = device.type == "cpu"  # made there, and checked once
        self._bases = {key: bases[key] if on_device else bases[key].to(device) for key in wanted}

    def cross(self, x_UH: Tensor, direction: Direction, boundary: int, microbatch: int) -> Tensor:
        which = self._spec.basis_direction(direction)
        basis = None if which is None else self._bases[(boundary, which)]
        seed = packet_seed(*self._place, microbatch, boundary)
        return self._codec.project(x_UH, direction, basis, seed=seed)


@dataclass
class _Replay:
    """One replay under way. The stages come one after the other: `forward` 0 to S-2, `loss` S-1, `backward` S-2 to 0."""

    objective: Objective
    batch: Batch
    share: bool
    links: _Links | None
    watch: Watch | None
    cancelled: Callable[[], bool]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    arrived: list[list[Tensor]] = field(default_factory=list)  # by boundary, rows U x H a microbatch, on the CPU
    returned: list[Tensor] = field(default_factory=list)  # of the boundary under way, their gradients

    @torch.no_grad()
    def forward(self, stage: Stage) -> None:
        rows = [self._sent(stage, self._through(stage, m)[1], m) for m in self._microbatches()]
        self.arrived.append(rows)

    def loss(self, stage: Stage) -> list[Tensor]:
        """The gradient of the last stage."""
        for m in self._microbatches():
            entered_UH, h_BTH = self._entered(stage, m)
            h_MH = self.objective.hidden(h_BTH, self.batch.layout(0, m))
            loss, metrics = self.objective.loss(stage, h_MH, self.batch, 0, m)
            loss.backward()
            self.metrics.append(metrics)
            self._return(stage, entered_UH, m)
        return self._done(stage)

    def backward(self, stage: Stage) -> list[Tensor]:
        """The gradient of a stage before the last one."""
        came, self.returned = self.returned, []
        for m in self._microbatches():
            entered_UH, left_UH = self._through(stage, m)
            left_UH.backward(came[m].to(left_UH))
            self._return(stage, entered_UH, m)
        return self._done(stage)

    def _microbatches(self) -> Iterator[int]:
        for m in range(self.batch.microbatches[0]):
            if self.cancelled():
                raise Cancelled
            yield m

    def _through(self, stage: Stage, m: int) -> tuple[Tensor | None, Tensor]:
        """(rows that entered a stage, as a leaf; rows that leave it)."""
        entered_UH, h_BTH = self._entered(stage, m)
        return entered_UH, self._crossing(m).leaving(pack_rows(h_BTH, self.batch.layout(0, m)))

    def _entered(self, stage: Stage, m: int) -> tuple[Tensor | None, Tensor]:
        entered_UH = None
        if stage.span.is_first:
            x = self.batch.ids(0, m).to(self.objective.device)
        else:
            rows_UH = self.arrived[stage.span.stage - 1][m].to(self.objective.device, self.objective.dtype)
            entered_UH = rows_UH.detach().requires_grad_(torch.is_grad_enabled())
            x = unpack_rows(self._crossing(m).arrived(entered_UH), self.batch.layout(0, m))
        with self.objective.autocast():
            return entered_UH, stage(x)

    def _sent(self, stage: Stage, left_UH: Tensor, m: int) -> Tensor:
        """What the next stage will see of these rows."""
        if self.links is not None:
            left_UH = self.links.cross(left_UH, Direction.FORWARD, stage.span.stage, m)
        return left_UH.cpu()

    def _return(self, stage: Stage, entered_UH: Tensor | None, m: int) -> None:
        """After a backward: the gradient of what entered, for the stage before."""
        if entered_UH is None:
            return
        grad_UH, boundary = entered_UH.grad, stage.span.stage - 1
        assert grad_UH is not None
        if self.watch is not None:
            self.watch(boundary, entered_UH.detach(), grad_UH)
        if self.links is not None:
            grad_UH = self.links.cross(grad_UH, Direction.BACKWARD, boundary, m)
        self.returned.append(grad_UH.cpu())

    def _done(self, stage: Stage) -> list[Tensor]:
        """The gradient of all parameters, in their order; zeros where no loss reached, as a stage's tally fills them in."""
        if not stage.span.is_first:
            self.arrived.pop()
        parameters = [p for _, p in stage.hf_named_parameters()]
        return [torch.zeros(p.shape, dtype=p.dtype) if p.grad is None else p.grad.cpu() for p in parameters]

    def _crossing(self, m: int) -> Crossing:
        return self.batch.crossing(0, m, share=self.share)
