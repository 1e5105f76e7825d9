"""The tensors of one stage: layers, optimizer, codec, gate, batches. Runs on the compute thread; knows no socket or frame.

Every public method is one piece of work of the schedule (schedule.Op). Autograd graphs live here between a microbatch's
forward and its backward; everything else about ordering is the schedule's.

Suffixes: N real tokens of a microbatch, U those whose rows cross a link, M its completion tokens, H hidden width,
B sequences, T padded length.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codec.basis import Basis
from codec.errors import NonFiniteError
from codec.spec import Direction
from swarm_core.config import RunConfig
from swarm_core.learning import optimizer as optim
from swarm_core.learning.batch import Batch
from swarm_core.learning.crossing import Crossing
from swarm_core.learning.dgg import Gate, Verdict
from swarm_core.learning.grpo import merge_metrics
from swarm_core.learning.microbatch import pack_rows, unpack_rows
from swarm_core.learning.objective import make_objective
from swarm_core.learning.stage import Stage
from swarm_core.manifest import Manifest
from swarm_core.models.reading import open_stage
from swarm_core.wire.messages import Decide, Mode, Outcome
from swarm_worker.correcting import Capture, Correcting, snapshot_bits
from swarm_worker.fidelity import Probe
from swarm_worker.lead import NONFINITE
from swarm_worker.link_ends import Bases, LinkEnd, Packet
from swarm_worker.schedule import COMPRESSED, Stamp
from swarm_worker.shard import Shard, clone_all, select
from swarm_worker.sketching import Sketcher, SketchOut

KEEP_PUBLISHED = 2  # versions of weights a sampler may still be fetching


@dataclass(frozen=True)
class Tally:
    """What a stage says in its vote."""

    norms: list[float]
    fault: str  # what could not be sent, and where; empty: every tensor of the tick could be
    gated: bool
    numbers: dict[str, float]


@dataclass
class _Live:
    """A microbatch between its forward and its backward."""

    crossing: Crossing
    entered_UH: Tensor | None  # what came over the link; its grad goes back
    left_UH: Tensor  # what went over the next link


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
        self.objective = make_objective(config, device)
        self.loss_spec = self.objective.spec
        self.dtype, self.compute_dtype = self.objective.dtype, self.objective.compute_dtype
        self.stage: Stage = open_stage(model_path, self.span, self.dtype).to(device)
        self.names = [name for name, _ in self.stage.hf_named_parameters()]
        self.parameters = [parameter for _, parameter in self.stage.hf_named_parameters()]
        self.reference: Stage | None = None
        if config.grpo.kl_beta > 0:
            self.reference = open_stage(model_path, self.span, self.dtype).to(device)
        self.optimizer_spec = optimizer_spec(config)
        self.optimizer = optim.build_optimizer(self.parameters, self.optimizer_spec)
        self.gate = Gate(config.dgg.window, config.dgg.tau, config.dgg.enabled)
        self.share_prompts = config.links.shares_prompts
        self.batches: dict[int, Batch] = {}
        self.bases: Bases = {}
        links = config.links
        sketches = config.anchor.q_cadence > 0 and config.anchor.q_source == "stage_sketch"
        self.sketcher = Sketcher(links.fit, links.outliers) if sketches else None
        ends = [None if b in (-1, manifest.boundaries) else b for b in (stage - 1, stage)]
        self.above, self.below = (  # the links to the stage before and to the next
            None if b is None else LinkEnd(manifest, b, self.bases, self.sketcher) for b in ends
        )
        self.published: dict[int, dict[str, Tensor]] = {}
        merges = config.corrections.merger != "none"
        self.correcting: Correcting | None = None
        if merges:
            bits = snapshot_bits(config, self.names, self.parameters, self.compute_dtype)
            self.correcting = Correcting(manifest, stage, self.parameters, bits)
        self._capture: Capture | None = None
        self._live: dict[int, _Live] = {}
        self._metrics: list[dict[str, Any]] = []
        self._verdict: Verdict | None = None
        self._fault = ""  # the first tensor that could not be sent since the last decision
        self._probe = Probe()
        self._fidelity: dict[str, float] = {}  # of the last probe, for the next vote

    # What comes in between rounds --------------------------------------------------------------------------------------

    def add_batch(self, batch: Batch) -> None:
        self.batches[batch.number] = batch

    def add_bases(self, version: int, bases: dict[tuple[int, Direction], Basis]) -> None:
        """Hold a new basis version; older ones stay until no batch is pinned to them."""
        on_device = self.device.type == "cpu"  # made there, and checked once
        self.bases[version] = {key: b if on_device else b.to(self.device) for key, b in bases.items()}

    @property
    def newest_basis(self) -> int:
        return max(self.bases, default=0)

    # The work of a round -----------------------------------------------------------------------------------------------

    def forward(self, stamp: Stamp, microbatch: int, packet: bytes | memoryview | None) -> Packet:
        """Forward of one microbatch; the activation for the next stage. The graph is kept for `backward`."""
        batch, slice_, index = self._place(stamp, microbatch)
        crossing = self._crossing(batch, slice_, index)
        entered_UH, h_BTH = self._enter(stamp, microbatch, packet, grad=True)
        left_UH = crossing.leaving(pack_rows(h_BTH, batch.layout(slice_, index)))
        self._live[microbatch] = _Live(crossing, entered_UH, left_UH)
        return self._send(self.below, left_UH, Direction.FORWARD, stamp, crossing, microbatch)

    def loss(self, stamp: Stamp, microbatch: int, packet: bytes | memoryview | None) -> Packet | None:
        """Last stage: forward, loss and backward of one microbatch; the gradient for the stage before, if any."""
        batch, slice_, index = self._place(stamp, microbatch)
        entered_UH, h_BTH = self._enter(stamp, microbatch, packet, grad=True)
        h_MH = self.objective.hidden(h_BTH, batch.layout(slice_, index))
        loss, metrics = self.objective.loss(self.stage, h_MH, batch, slice_, index)
        loss.backward()
        if stamp.mode is Mode.PROBE:
            self._probe.keep_hidden(microbatch, h_MH)
        else:
            self._metrics.append(metrics)
        return self._return(stamp, entered_UH, self._crossing(batch, slice_, index), microbatch)

    def backward(self, stamp: Stamp, microbatch: int, packet: bytes | memoryview) -> Packet | None:
        """Backward of one microbatch from the gradient that came; the gradient for the stage before, if any."""
        live = self._live.pop(microbatch)
        assert self.below is not None
        grad_UH = self.below.decode(packet, Direction.BACKWARD, stamp, live.crossing, microbatch)
        live.left_UH.backward(grad_UH.to(live.left_UH))
        return self._return(stamp, live.entered_UH, live.crossing, microbatch)

    def resend(self, stamp: Stamp, microbatch: int) -> Packet:
        """The activation that `forward` gave, once more and without references: the next stage does not hold them."""
        assert self.below is not None
        return self.below.encode_whole(stamp, self._live[microbatch].crossing)

    def compare(self, stamp: Stamp) -> None:
        """The end of a probe: compare its two passes. What is found goes with the next vote."""
        probe, self._probe = self._probe, Probe()
        numbers = probe.compare(self.span.stage)
        if self.span.is_last:
            batch, slice_, index = self._place(stamp, COMPRESSED)
            targets_M = batch.microbatch(slice_, index).targets_M.to(self.device)
            weight_VH = self.stage.lm_head_weight.detach().to(self.compute_dtype)
            config = self.manifest.config
            numbers |= probe.compare_policies(weight_VH, targets_M, config.grpo.temperature, config.swarm.logprob_chunk)
        self._fidelity = probe.report(numbers)

    @torch.no_grad()
    def score(self, stamp: Stamp, microbatch: int, packet: bytes | memoryview | None) -> Packet | None:
        """Forward only: old log-probs (or those of the initial weights) on the last stage, an activation elsewhere."""
        batch, slice_, index = self._place(stamp, microbatch)
        stage = self.stage if stamp.mode is Mode.SCORE else self.reference
        assert stage is not None, "a REFERENCE round began without a KL penalty"
        _, h_BTH = self._enter(stamp, microbatch, packet, grad=False, stage=stage)
        layout = batch.layout(slice_, index)
        if not self.span.is_last:
            crossing = self._crossing(batch, slice_, index)
            left_UH = crossing.leaving(pack_rows(h_BTH, layout))
            return self._send(self.below, left_UH, Direction.FORWARD, stamp, crossing, microbatch)
        targets_M = batch.microbatch(slice_, index).targets_M.to(self.device)
        logp_M, _ = self.objective.logprobs(stage, self.objective.hidden(h_BTH, layout), targets_M)
        (batch.keep_old if stamp.mode is Mode.SCORE else batch.keep_reference)(slice_, index, logp_M)
        return None

    def tally(self, stamp: Stamp) -> Tally:
        """Check the tick's gradient; on the last stage, ask the gate; merge the stamped correction; take the norms."""
        if self.above is not None and (strange := self.above.sizes.fault()) and not self._fault:
            self._fault = f"stage {self.span.stage}, tick {stamp.tick}: {strange}"
        optim.fill_missing_gradients(self.parameters)
        norms = optim.gradient_norms(self.parameters)
        numbers = merge_metrics(self._metrics)
        self._metrics = []
        numbers |= self._fidelity
        self._fidelity = {}
        for end in self._ends:
            numbers |= end.take_measures()
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
        if self.correcting is not None and stamp.correction:
            numbers |= self.correcting.merge(stamp)
            norms = optim.gradient_norms(self.parameters)
        return Tally(norms, self._fault, gated, numbers)

    def apply(self, stamp: Stamp, decide: Decide) -> list[SketchOut]:
        """Step, or leave everything as it was; then what ends with the tick. Returns sketches that are due."""
        if decide.outcome == Outcome.COMMIT:
            if self.correcting is not None:
                self._capture = self.correcting.capture(stamp, self.batches[stamp.batch])
            rate = optim.learning_rate(self.optimizer_spec, stamp.step)
            optim.apply(self.optimizer, decide.coefficient, rate)
        self.optimizer.zero_grad(set_to_none=True)
        if self._verdict is not None and decide.reason != NONFINITE:
            self.gate.record(self._verdict)  # a poisoned tick says nothing about the policy
        self._verdict = None
        if decide.outcome != Outcome.HOLD:
            self._fault = ""  # one of a score pass is the next tick's
        self._live.clear()
        if self.correcting is not None and decide.outcome != Outcome.HOLD:
            self.correcting.settle(stamp, committed=decide.outcome == Outcome.COMMIT)
        for end in self._ends:
            if decide.outcome != Outcome.HOLD:
                end.settle(keep=decide.outcome == Outcome.COMMIT)
            if decide.end_of_batch:
                end.forget()
        if decide.end_of_batch:
            self.batches.pop(stamp.batch, None)
            for version in [v for v in self.bases if v < stamp.basis_version]:
                del self.bases[version]
        cadence = self.manifest.config.anchor.q_cadence
        if self.sketcher is None or decide.outcome == Outcome.HOLD or (stamp.tick + 1) % cadence:
            return []
        return self.sketcher.take()

    def take_capture(self) -> Capture | None:
        """The weights and the slice that the last tick leaves for the anchor, once."""
        capture, self._capture = self._capture, None
        return capture

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
                name = f"basis.{version}.{boundary}.{int(direction)}"
                tensors |= {f"{name}.encoder": basis.encoder_HR, f"{name}.decoder": basis.decoder_RH}
                bases.append([version, boundary, int(direction), basis.step])
        batches = []
        for number, batch in self.batches.items():
            columns = {name: value for name, value in vars(batch).items() if not name.startswith("_")}
            held = {name: value for name, value in columns.items() if isinstance(value, Tensor)}
            tensors |= {f"batch.{number}.{name}": value for name, value in held.items()}
            batches.append({n: v for n, v in columns.items() if n not in held and isinstance(v, (int, list))})
        for end in self._ends:
            tensors |= {f"references.{end.boundary}.{name}": tensor for name, tensor in end.references().items()}
        windows: list[Any] = []
        if self.sketcher is not None:
            held, windows = self.sketcher.state()
            tensors |= {f"window.{name}": tensor for name, tensor in held.items()}
        corrections: dict[str, Any] = {}
        if self.correcting is not None:
            held, corrections = self.correcting.state()
            tensors |= {f"correction.{name}": tensor for name, tensor in held.items()}
        held_back = {"steps": steps, "corrections": corrections, "gate": self.gate.state_dict(), "fault": self._fault}
        lists = {"bases": bases, "batches": batches, "windows": windows}
        return Shard(tensors, {**meta, **held_back, **lists})

    def from_shard(self, shard: Shard) -> None:
        """Take up a saved state."""
        with torch.no_grad():
            for name, parameter in zip(self.names, self.parameters, strict=True):
                parameter.copy_(shard.tensors[name])
        optim.import_state(self.optimizer, self.names, select(shard.tensors, "optimizer"), shard.meta["steps"])
        self.gate.load_state_dict(shard.meta["gate"])
        self._fault = shard.meta["fault"]
        for version, boundary, direction, step in shard.meta["bases"]:
            parts = select(shard.tensors, f"basis.{version}.{boundary}.{direction}")
            basis = Basis(version, parts["encoder"].to(self.device), parts["decoder"].to(self.device), step)
            self.bases.setdefault(version, {})[(boundary, Direction(direction))] = basis
        for columns in shard.meta["batches"]:
            number = columns["number"]
            self.add_batch(Batch(**columns, **select(shard.tensors, f"batch.{number}")))
        for end in self._ends:
            end.load_references(select(shard.tensors, f"references.{end.boundary}"))
        if self.sketcher is not None:
            self.sketcher.load(select(shard.tensors, "window"), shard.meta["windows"], self.device)
        if self.correcting is not None:
            self.correcting.load(select(shard.tensors, "correction"), shard.meta["corrections"])

    # Inside ------------------------------------------------------------------------------------------------------------

    def _place(self, stamp: Stamp, microbatch: int) -> tuple[Batch, int, int]:
        """(batch, slice, microbatch of the slice) of a round's microbatch. A probe has a small batch of its own."""
        batch = self.batches[stamp.batch]
        match stamp.mode:
            case Mode.TRAIN:
                return batch, stamp.slice, microbatch
            case Mode.PROBE:
                return batch.probe(stamp.slice, self.manifest.config.links.fidelity_sequences), 0, 0
        return batch, *batch.place(microbatch)

    def _enter(
        self,
        stamp: Stamp,
        microbatch: int,
        packet: bytes | memoryview | None,
        *,
        grad: bool,
        stage: Stage | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """(what came over the link as a leaf, the stage's output h_BTH)."""
        entered_UH = None
        batch, slice_, index = self._place(stamp, microbatch)
        if self.span.is_first:
            x = batch.ids(slice_, index).to(self.device)
        else:
            assert packet is not None
            assert self.above is not None
            crossing = self._crossing(batch, slice_, index)
            rows_UH = self.above.decode(packet, Direction.FORWARD, stamp, crossing, microbatch)
            entered_UH = rows_UH.to(self.device, self.dtype).requires_grad_(grad)
            x = unpack_rows(crossing.arrived(entered_UH), batch.layout(slice_, index))
        with self.objective.autocast():
            return entered_UH, (stage or self.stage)(x)

    def _return(self, stamp: Stamp, entered_UH: Tensor | None, crossing: Crossing, microbatch: int) -> Packet | None:
        """After a backward: the gradient of what came over the link, for the stage before."""
        if stamp.mode is Mode.PROBE:
            self._probe.keep_gradient(microbatch, self.parameters)
        if entered_UH is None:
            return None
        assert entered_UH.grad is not None and self.above is not None
        self.above.watch_returned(stamp, entered_UH, entered_UH.grad)
        return self._send(self.above, entered_UH.grad, Direction.BACKWARD, stamp, crossing, microbatch)

    def _send(
        self,
        end: LinkEnd | None,
        x_UH: Tensor,
        direction: Direction,
        stamp: Stamp,
        crossing: Crossing,
        microbatch: int,
    ) -> Packet:
        assert end is not None, "only a stage with a neighbour there sends"
        try:
            return end.encode(x_UH, direction, stamp, crossing, microbatch)
        except NonFiniteError as error:
            # The pipeline must drain, so zeros travel instead; the vote carries the verdict and no stage steps.
            if stamp.mode is Mode.PROBE:
                self._probe.poisoned = True
            elif not self._fault:
                where = f"stage {self.span.stage}, microbatch {microbatch}, tick {stamp.tick}"
                self._fault = f"{where} ({stamp.mode.name.lower()}): {error}"
            return end.encode(torch.zeros_like(x_UH), direction, stamp, crossing, microbatch)

    def _crossing(self, batch: Batch, slice_: int, microbatch: int) -> Crossing:
        return batch.crossing(slice_, microbatch, share=self.share_prompts)

    @property
    def _ends(self) -> list[LinkEnd]:
        return [end for end in (self.above, self.below) if end is not None]
