"""The tensors of one stage: layers, optimizer, codec, gate, batches. Runs on the compute thread; knows no socket or frame.

Every public method is one piece of work of the schedule (schedule.Op). Autograd graphs live here between a microbatch's
forward and its backward; everything else about ordering is the schedule's.

Suffixes: N real tokens of a microbatch, M its completion tokens, H hidden width, B sequences, T padded length.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codec.basis import Basis, captured_share, rms_weights, sketch
from codec.errors import BasisMismatch, NonFiniteError
from codec.link_codec import LinkCodec
from codec.spec import Direction, dense_bytes
from swarm_core.config import RunConfig
from swarm_core.learning import optimizer as optim
from swarm_core.learning.batch import Batch
from swarm_core.learning.dgg import Gate, Verdict
from swarm_core.learning.grpo import Denominators, LossSpec, grpo_loss, merge_metrics
from swarm_core.learning.logprobs import token_logprobs
from swarm_core.learning.microbatch import Layout, completion_rows, pack_rows, unpack_rows
from swarm_core.learning.stage import Stage
from swarm_core.manifest import Manifest
from swarm_core.models.reading import open_stage
from swarm_core.wire.messages import Decide, Mode, Outcome
from swarm_worker.lead import NONFINITE
from swarm_worker.schedule import Stamp
from swarm_worker.shard import Shard, clone_all, select

KEEP_PUBLISHED = 2  # versions of weights a sampler may still be fetching


@dataclass(frozen=True)
class Packet:
    """Bytes for a neighbour, and what the tensor would have cost in bf16."""

    payload: bytes
    dense_bytes: int


@dataclass(frozen=True)
class Tally:
    """What a stage says in its vote."""

    norms: list[float]
    sound: bool  # every tensor of the tick could be sent
    gated: bool
    numbers: dict[str, float]


@dataclass(frozen=True)
class SketchOut:
    """One boundary's sketch V (H x r) of a window, for the anchor."""

    boundary: int
    direction: Direction
    version: int
    v_HR: Tensor


@dataclass
class _Window:
    """A sketch under way."""

    version: int  # sums against two bases would mean nothing
    v_HR: Tensor


@dataclass
class _Live:
    """A microbatch between its forward and its backward."""

    layout: Layout
    entered_NH: Tensor | None  # what came over the link; its grad goes back
    left_NH: Tensor  # what went over the next link


def optimizer_spec(config: RunConfig) -> optim.OptimizerSpec:
    """The [optimizer] knobs in the words of the learning room."""
    o = config.optimizer
    return optim.OptimizerSpec(
        learning_rate=o.lr,
        beta1=o.beta1,
        beta2=o.beta2,
        epsilon=o.eps,
        weight_decay=o.weight_decay,
        max_grad_norm=o.max_grad_norm,
        schedule=o.schedule,
        warmup_steps=o.warmup_ticks,
        total_steps=config.run.ticks,
    )


class StageCompute:
    """One stage's numerics. Not thread-safe: one thread calls it."""

    def __init__(self, manifest: Manifest, stage: int, model_path: str | Path, device: torch.device) -> None:
        config = manifest.config
        self.manifest = manifest
        self.span = manifest.spans[stage]
        self.device = device
        self.dtype = torch.float64 if config.run.precision == "fp64" else torch.float32
        bf16 = config.run.precision == "bf16" or (config.run.precision == "auto" and device.type == "cuda")
        self.compute_dtype = torch.bfloat16 if bf16 else self.dtype  # of matmuls; the masters stay in self.dtype
        self.stage: Stage = open_stage(model_path, self.span, self.dtype).to(device)
        self.names = [name for name, _ in self.stage.hf_named_parameters()]
        self.parameters = [parameter for _, parameter in self.stage.hf_named_parameters()]
        self.reference: Stage | None = None
        if config.grpo.kl_beta > 0:
            self.reference = open_stage(model_path, self.span, self.dtype).to(device)
        self.optimizer_spec = optimizer_spec(config)
        self.optimizer = optim.build_optimizer(self.parameters, self.optimizer_spec)
        g = config.grpo
        self.loss_spec = LossSpec(
            loss=g.loss,
            clip_low=g.clip_low,
            clip_high=g.clip_high,
            dual_clip=g.dual_clip,
            beta=g.kl_beta,
            level=g.ratio_level,
            tis_cap=g.sampler_correction_cap,
            max_completion_length=g.max_completion_length,
            scale_rewards=g.scale_rewards,
            mask_truncated=g.mask_truncated,
        )
        self.gate = Gate(config.dgg.window, config.dgg.tau, config.dgg.enabled)
        self.link = manifest.link()
        self.above = LinkCodec(self.link)  # the link to the stage before
        self.below = LinkCodec(self.link)
        self.batches: dict[int, Batch] = {}
        self.bases: dict[int, dict[tuple[int, Direction], Basis]] = {}
        self.published: dict[int, dict[str, Tensor]] = {}
        self._live: dict[int, _Live] = {}
        self._windows: dict[tuple[int, Direction], _Window] = {}
        self._metrics: list[dict[str, Any]] = []
        self._shares: dict[tuple[int, Direction], list[tuple[float, int]]] = {}
        self._verdict: Verdict | None = None
        self._poison: NonFiniteError | None = None

    # What comes in between rounds --------------------------------------------------------------------------------------

    def add_batch(self, batch: Batch) -> None:
        self.batches[batch.number] = batch

    def add_bases(self, version: int, bases: dict[tuple[int, Direction], Basis]) -> None:
        """Hold a new basis version; older ones stay until no batch is pinned to them."""
        on_device = self.device.type == "cpu"  # made there, and checked once
        self.bases[version] = {
            key: b if on_device else Basis(version, b.q_HR.to(self.device)) for key, b in bases.items()
        }

    @property
    def newest_basis(self) -> int:
        return max(self.bases, default=0)

    # The work of a round -----------------------------------------------------------------------------------------------

    def forward(self, stamp: Stamp, microbatch: int, packet: bytes | memoryview | None) -> Packet:
        """Forward of one microbatch; the activation for the next stage. The graph is kept for `backward`."""
        batch = self.batches[stamp.batch]
        layout = batch.layout(stamp.slice, microbatch)
        entered_NH, h_BTH = self._enter(stamp, batch, stamp.slice, microbatch, packet, grad=True)
        left_NH = pack_rows(h_BTH, layout)
        self._live[microbatch] = _Live(layout, entered_NH, left_NH)
        self._watch(stamp, self.span.stage, Direction.FORWARD, left_NH)
        return self._encode(self.below, left_NH, Direction.FORWARD, stamp, self.span.stage)

    def loss(self, stamp: Stamp, microbatch: int, packet: bytes | memoryview | None) -> Packet | None:
        """Last stage: forward, loss and backward of one microbatch; the gradient for the stage before, if any."""
        batch = self.batches[stamp.batch]
        mb = batch.microbatch(stamp.slice, microbatch).to(self.device)
        entered_NH, h_BTH = self._enter(stamp, batch, stamp.slice, microbatch, packet, grad=True)
        logp_M, entropy_M = self._logprobs(self.stage, h_BTH, mb.layout, mb.targets_M)
        reference_M = batch.reference(stamp.slice, microbatch)
        denominators = Denominators(batch.slice_tokens[stamp.slice], batch.slice_sequences[stamp.slice])
        loss, metrics = grpo_loss(
            logp_M,
            mb,
            self.loss_spec,
            denominators,
            None if reference_M is None else reference_M.to(self.device),
            entropy_M,
        )
        loss.backward()
        self._metrics.append(metrics)
        return self._return(stamp, entered_NH)

    def backward(self, stamp: Stamp, microbatch: int, packet: bytes | memoryview) -> Packet | None:
        """Backward of one microbatch from the gradient that came; the gradient for the stage before, if any."""
        live = self._live.pop(microbatch)
        basis = self._basis(stamp, self.span.stage, Direction.BACKWARD)
        grad_NH = self.below.decode(packet, live.layout.tokens, Direction.BACKWARD, basis)
        live.left_NH.backward(grad_NH.to(live.left_NH))
        return self._return(stamp, live.entered_NH)

    @torch.no_grad()
    def score(self, stamp: Stamp, microbatch: int, packet: bytes | memoryview | None) -> Packet | None:
        """Forward only: old log-probs (or those of the initial weights) on the last stage, an activation elsewhere."""
        batch = self.batches[stamp.batch]
        slice_, index = batch.place(microbatch)
        stage = self.stage if stamp.mode is Mode.SCORE else self.reference
        assert stage is not None, "a REFERENCE round began without a KL penalty"
        _, h_BTH = self._enter(stamp, batch, slice_, index, packet, grad=False, stage=stage)
        layout = batch.layout(slice_, index)
        if not self.span.is_last:
            return self._encode(self.below, pack_rows(h_BTH, layout), Direction.FORWARD, stamp, self.span.stage)
        targets_M = batch.microbatch(slice_, index).targets_M.to(self.device)
        logp_M, _ = self._logprobs(stage, h_BTH, layout, targets_M)
        (batch.keep_old if stamp.mode is Mode.SCORE else batch.keep_reference)(slice_, index, logp_M)
        return None

    def tally(self, stamp: Stamp) -> Tally:
        """Check the tick's gradient and take its norms; on the last stage, ask the gate.

        A correction of the anchor would be merged here, before the norms (stamp.correction is 0: none).
        """
        optim.fill_missing_gradients(self.parameters)
        norms = optim.gradient_norms(self.parameters)
        numbers = merge_metrics(self._metrics)
        self._metrics = []
        for (boundary, direction), shares in self._shares.items():
            tokens = sum(n for _, n in shares)
            mean = sum(share * n for share, n in shares) / max(tokens, 1)
            numbers[f"basis/share_{direction.name.lower()}/boundary_{boundary}"] = mean
        self._shares = {}
        gated = False
        self._verdict = None
        if self.span.is_last and stamp.microbatches > 0:
            head = norms[self.names.index("lm_head.weight")]
            self._verdict = self.gate.judge(head * head, max(stamp.pass_, 1))
            gated = self._verdict.gated
            numbers["dgg/g"] = head * head
            numbers["dgg/full"] = float(self._verdict.full)
            if self._verdict.z is not None:
                numbers["dgg/z"] = self._verdict.z
        return Tally(norms, self._poison is None, gated, numbers)

    def apply(self, stamp: Stamp, decide: Decide) -> list[SketchOut]:
        """Step, or leave everything as it was; then what ends with the tick. Returns sketches that are due."""
        if decide.outcome == Outcome.COMMIT:
            rate = optim.learning_rate(self.optimizer_spec, stamp.step)
            optim.apply(self.optimizer, decide.coefficient, rate)
        self.optimizer.zero_grad(set_to_none=True)
        if self._verdict is not None and decide.reason != NONFINITE:
            self.gate.record(self._verdict)  # a poisoned tick says nothing about the policy
        self._verdict, self._poison = None, None
        self._live.clear()
        if decide.end_of_batch:
            self.batches.pop(stamp.batch, None)
            self.bases = {v: b for v, b in self.bases.items() if v >= stamp.basis_version}
        cadence = self.manifest.config.anchor.q_cadence
        if decide.outcome == Outcome.HOLD or cadence == 0 or (stamp.tick + 1) % cadence:
            return []
        return self._take_sketches()

    # Weights and state -------------------------------------------------------------------------------------------------

    def publish(self, version: int) -> None:
        """Keep a copy of these weights for the samplers, in the compute dtype."""
        weights = {n: p.detach().to(self.compute_dtype) for n, p in zip(self.names, self.parameters, strict=True)}
        self.published[version] = clone_all(weights)
        for old in sorted(self.published)[:-KEEP_PUBLISHED]:
            del self.published[old]

    def to_shard(self, meta: dict[str, Any]) -> Shard:
        """Everything this stage needs to go on, bit for bit."""
        tensors = dict(zip(self.names, (p.detach() for p in self.parameters), strict=True))
        moments, steps = optim.export_state(self.optimizer, self.names)
        tensors |= {f"optimizer.{name}": tensor for name, tensor in moments.items()}
        bases = []
        for version, held in self.bases.items():
            for (boundary, direction), basis in held.items():
                tensors[f"basis.{version}.{boundary}.{int(direction)}"] = basis.q_HR
                bases.append([version, boundary, int(direction)])
        batches = []
        for number, batch in self.batches.items():
            columns = {name: value for name, value in vars(batch).items() if not name.startswith("_")}
            held = {name: value for name, value in columns.items() if isinstance(value, Tensor)}
            tensors |= {f"batch.{number}.{name}": value for name, value in held.items()}
            batches.append({n: v for n, v in columns.items() if n not in held and isinstance(v, (int, list))})
        windows = []
        for (boundary, direction), window in self._windows.items():
            tensors[f"window.{boundary}.{int(direction)}"] = window.v_HR
            windows.append([boundary, int(direction), window.version])
        held_back = {"steps": steps, "gate": self.gate.state_dict()}
        lists = {"bases": bases, "batches": batches, "windows": windows}
        return Shard(tensors, {**meta, **held_back, **lists})

    def from_shard(self, shard: Shard) -> None:
        """Take up a saved state."""
        with torch.no_grad():
            for name, parameter in zip(self.names, self.parameters, strict=True):
                parameter.copy_(shard.tensors[name])
        optim.import_state(self.optimizer, self.names, select(shard.tensors, "optimizer"), shard.meta["steps"])
        self.gate.load_state_dict(shard.meta["gate"])
        for version, boundary, direction in shard.meta["bases"]:
            q_HR = shard.tensors[f"basis.{version}.{boundary}.{direction}"]
            held = self.bases.setdefault(version, {})
            held[(boundary, Direction(direction))] = Basis(version, q_HR.to(self.device))
        for columns in shard.meta["batches"]:
            number = columns["number"]
            self.add_batch(Batch(**columns, **select(shard.tensors, f"batch.{number}")))
        for boundary, direction, version in shard.meta["windows"]:
            v_HR = shard.tensors[f"window.{boundary}.{direction}"].to(self.device)
            self._windows[(boundary, Direction(direction))] = _Window(version, v_HR)

    # Inside ------------------------------------------------------------------------------------------------------------

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.compute_dtype is self.dtype:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype)

    def _enter(
        self,
        stamp: Stamp,
        batch: Batch,
        slice_: int,
        microbatch: int,
        packet: bytes | memoryview | None,
        *,
        grad: bool,
        stage: Stage | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """(what came over the link as a leaf, the stage's output h_BTH)."""
        entered_NH = None
        if self.span.is_first:
            x = batch.ids(slice_, microbatch).to(self.device)
        else:
            assert packet is not None
            layout = batch.layout(slice_, microbatch)
            basis = self._basis(stamp, self.span.stage - 1, Direction.FORWARD)
            rows_NH = self.above.decode(packet, layout.tokens, Direction.FORWARD, basis)
            entered_NH = rows_NH.to(self.device, self.dtype).requires_grad_(grad)
            x = unpack_rows(entered_NH, layout)
        with self._autocast():
            return entered_NH, (stage or self.stage)(x)

    def _logprobs(self, stage: Stage, h_BTH: Tensor, layout: Layout, targets_M: Tensor) -> tuple[Tensor, Tensor]:
        # The casts stand outside autocast: the chunked backward recomputes logits and must see the same dtypes.
        h_MH = completion_rows(h_BTH, layout).to(self.compute_dtype)
        weight_VH = stage.lm_head_weight.to(self.compute_dtype)
        config = self.manifest.config
        return token_logprobs(h_MH, weight_VH, targets_M, config.grpo.temperature, config.swarm.logprob_chunk)

    def _return(self, stamp: Stamp, entered_NH: Tensor | None) -> Packet | None:
        if entered_NH is None:
            return None
        assert entered_NH.grad is not None
        boundary = self.span.stage - 1
        self._watch(stamp, boundary, Direction.BACKWARD, entered_NH.grad)
        return self._encode(self.above, entered_NH.grad, Direction.BACKWARD, stamp, boundary)

    def _encode(self, codec: LinkCodec, x_NH: Tensor, direction: Direction, stamp: Stamp, boundary: int) -> Packet:
        basis = self._basis(stamp, boundary, direction)
        dense = dense_bytes(self.link.width, len(x_NH))
        try:
            return Packet(codec.encode(x_NH, direction, basis), dense)
        except NonFiniteError as error:
            # The pipeline must drain, so zeros travel instead; the vote carries the verdict and no stage steps.
            self._poison = error
            return Packet(codec.encode(torch.zeros_like(x_NH), direction, basis), dense)

    def _basis(self, stamp: Stamp, boundary: int, direction: Direction) -> Basis | None:
        """The basis that this direction is coded in, of the version the batch is pinned to."""
        which = self.link.basis_direction(direction)
        if which is None:
            return None
        if stamp.basis_version not in self.bases:
            raise BasisMismatch(stamp.basis_version, self.newest_basis)
        return self.bases[stamp.basis_version][(boundary, which)]

    @torch.no_grad()
    def _watch(self, stamp: Stamp, boundary: int, direction: Direction, x_NH: Tensor) -> None:
        """Take the captured share, and add to the sketch that the anchor will make the next basis of."""
        if self.link.basis_direction(direction) is not direction:
            return  # no basis, or `exact`, whose gradients travel on the activations' basis
        basis = self._basis(stamp, boundary, direction)
        assert basis is not None
        rows_NH = x_NH.detach().float()
        weights_N = rms_weights(rows_NH) if direction is Direction.FORWARD else None
        share = float(captured_share(rows_NH, basis.q_HR, weights_N))
        if not math.isfinite(share):
            return
        self._shares.setdefault((boundary, direction), []).append((share, len(rows_NH)))
        if self.manifest.config.anchor.q_cadence == 0:
            return
        window = self._windows.get((boundary, direction))
        if window is None or window.version != basis.version:
            window = self._windows[(boundary, direction)] = _Window(basis.version, torch.zeros_like(basis.q_HR))
        window.v_HR += sketch(rows_NH, basis.q_HR, weights_N)

    def _take_sketches(self) -> list[SketchOut]:
        out = [SketchOut(b, d, w.version, w.v_HR.cpu()) for (b, d), w in sorted(self._windows.items())]
        self._windows = {}
        return out
