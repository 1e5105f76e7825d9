"""What the slow circuit costs in bytes and what its wire forms keep, side by side on one run. Judges no training."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from anchor_node.dense_replay import DenseReplay
from codec import corrections, weight_delta
from codec.corrections import CorrectionEncoder, CorrectionSpec
from experiments.codec.chain import Chain
from experiments.decoupling.anchor import Gradients, LaggingAnchor, cosine
from experiments.decoupling.cells import SIZES
from experiments.decoupling.training import LaggingTraining
from swarm_core.config import RunConfig, load
from swarm_core.learning.batch import Batch
from swarm_core.manifest import Manifest
from swarm_core.wire.frames import message_bytes
from swarm_core.wire.messages import FrameKind
from swarm_worker.correcting import BF16_BITS, TF32_BITS, Capture

APART = 20  # ticks from one snapshot to the next; a delta over three of them is one over 60
SPANS = (1, 3)
ROUNDED: dict[str, int | None] = {"bf16": BF16_BITS, "tf32": TF32_BITS, "exact": None}
Form = Literal["sign", "lowrank", "topk", "bf16"]
FORMS: tuple[Form, ...] = get_args(Form)
SNAPSHOTS = {
    "anchor.m_cadence": str(APART),
    "anchor.latency": "natural",
    "anchor.snapshot": "exact",
    "corrections.merger": "held_delta",
    "sampler.overlap": "false",
    "links.fidelity_every": "0",
}


class Scales(LaggingAnchor):
    """An anchor that weighs every snapshot and correction in all forms, beside the one it sends. Sums over the stages.

    `bytes` and `cosines` by what was weighed; `snapshots` are those of the run so far, exact.
    """

    def __init__(self, manifest: Manifest, model_path: Path, chain: Chain) -> None:
        super().__init__(manifest, model_path, chain)
        self.bytes: dict[str, list[int]] = defaultdict(list)
        self.cosines: dict[str, list[float]] = defaultdict(list)
        self.snapshots: list[list[list[Tensor]]] = []
        c = manifest.config.corrections
        self._specs = {form: CorrectionSpec(form, c.rank, c.share) for form in FORMS}
        self._warm: dict[tuple[str, str], list[CorrectionEncoder]] = {}

    def needed(self, replay: DenseReplay, weights: Gradients, batch: Batch, capture: Capture) -> Gradients:
        self.snapshots.append(weights)
        for name, bits in ROUNDED.items():
            self._weigh_snapshot(name, bits)
        dense = replay.run(batch, codec=False, tick=capture.tick).gradients
        delta = super().needed(replay, weights, batch, capture)
        for form in FORMS:
            self._weigh_correction(form, "M", dense)
            self._weigh_correction(form, "delta", delta)
        return delta

    def count(self, kind: FrameKind, tick: int, number: int, direction: str, payload: bytes) -> None:
        super().count(kind, tick, number, direction, payload)
        if kind is FrameKind.SLICE:
            self.bytes["slice"].append(message_bytes(len(payload)))

    def _weigh_snapshot(self, name: str, bits: int | None) -> None:
        def as_sent(weights: list[Tensor]) -> list[Tensor]:
            return weights if bits is None else [weight_delta.rounded(w, bits) for w in weights]

        newest = [as_sent(weights) for weights in self.snapshots[-1]]
        if len(self.snapshots) == 1:
            whole = [message_bytes(len(weight_delta.encode(weights, None))) for weights in newest]
            self.bytes[f"snapshot {name} whole"].append(sum(whole))
        for span in SPANS:
            if len(self.snapshots) > span:
                pairs = zip(newest, self.snapshots[-1 - span], strict=True)
                sizes = [message_bytes(len(weight_delta.encode(new, as_sent(old)))) for new, old in pairs]
                self.bytes[f"snapshot {name} {span * APART}"].append(sum(sizes))

    def _weigh_correction(self, form: Form, what: str, exact: Gradients) -> None:
        spec = self._specs[form]
        encoders = self._warm.setdefault((form, what), [CorrectionEncoder(spec, of) for of in self.shapes])
        packets = [encoder.encode(parts) for encoder, parts in zip(encoders, exact, strict=True)]
        decoded = [corrections.decode(packet, spec, of) for packet, of in zip(packets, self.shapes, strict=True)]
        self.bytes[f"{what} {form}"].append(sum(message_bytes(len(packet)) for packet in packets))
        self.cosines[f"{what} {form}"].append(cosine(decoded, exact))


def weigh(name: str, overrides: dict[str, str], folder: Path) -> dict[str, Any]:
    """Train as the run file says, weighing along the way. Bytes are message bytes, means over the snapshots."""
    run_file, ticks, own = SIZES[name]
    config = load(run_file, {**own, "run.ticks": str(ticks), **SNAPSHOTS, **overrides})
    training = LaggingTraining(config, folder)
    scales = training.anchor = Scales(training.manifest, training.model_path, training.chain)
    try:
        training.run()
    finally:
        training.close()
    ledger = training.chain.ledger.take()

    def per_tick(*kinds: str) -> float:
        return sum(row.message_bytes for row in ledger if row.kind in kinds) / ticks

    return {
        "ticks": ticks,
        "lr": config.optimizer.lr,
        "tokens_per_tick": statistics.fmean(row.numbers["tokens"] for row in training.ticks),
        "run_ticks": _declared(name),
        "parameters": sum(parameter.numel() for stage in training.chain.stages for parameter in stage.parameters),
        "fast_per_tick": per_tick("activation", "gradient"),
        "bases_per_tick": per_tick("basis", "sketch"),
        "slice": sum(scales.bytes.pop("slice")) / len(scales.snapshots),
        "bytes": {what: statistics.fmean(values) for what, values in scales.bytes.items()},
        "cosines": {what: statistics.fmean(values) for what, values in scales.cosines.items()},
        "snapshots": len(scales.snapshots),
    }


def _declared(name: str) -> int:
    """The ticks of the example's own run, over which its first snapshot, a whole one, is spread."""
    config: RunConfig = load(SIZES[name][0])
    return config.run.ticks
