"""The slow anchor in one thread, its latency exact: captures in, corrections out. No stream, no clock, no training.

What a swarm's anchor does on a thread of its own happens here at the end of the snapshot tick: weights and slice cross
as their frames' payloads, are replayed, and what comes of it is held by every stage at once. `not_before` makes the
latency: the lead stamps a correction from tick s + K on, not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from anchor_node.dense_replay import DenseReplay
from codec import corrections, weight_delta
from codec.basis import Basis
from codec.corrections import CorrectionEncoder
from experiments.codec.chain import Chain
from swarm_core.learning.batch import Batch
from swarm_core.learning.merge import smooth
from swarm_core.learning.stage import Stage
from swarm_core.manifest import Manifest
from swarm_core.models.architecture import read_shape
from swarm_core.models.reading import stage_with, tensor_shapes
from swarm_core.wire.bases import Key
from swarm_core.wire.corrections import correction_spec, digest_of, read_slice, slice_message
from swarm_core.wire.messages import Correction, FrameKind, Slice, Snapshot, from_bytes, to_bytes
from swarm_worker.correcting import Capture

Gradients = list[list[Tensor]]  # a list a stage, in the order of its parameters


class LaggingAnchor:
    """Makes the corrections of the run whose stages are `chain`'s."""

    def __init__(self, manifest: Manifest, model_path: Path, chain: Chain) -> None:
        fires = manifest.fires()
        assert fires is not None, "a run without a merger has no corrections"
        self.manifest, self._fires, self._chain = manifest, fires, chain
        shape = read_shape(model_path)
        self.shapes = [list(tensor_shapes(shape, span).values()) for span in manifest.spans]
        self._spec, seed = correction_spec(manifest.config), manifest.config.run.seed
        self._encoders = [CorrectionEncoder(self._spec, of, seed + i) for i, of in enumerate(self.shapes)]
        self._model_path = model_path
        self._means: Gradients | None = None
        self._held: list[list[Tensor] | None] = [None] * manifest.stages  # what the next snapshot is a delta against

    def take(self, captures: Sequence[Capture]) -> float:
        """The captures of one tick, one a stage: replay it, and let every stage hold its correction.

        Returns what the wire form keeps of the corrections: cos(decoded, exact) over all stages.
        """
        first, weights = captures[0], [capture.rounded() for capture in captures]
        for number, capture in enumerate(captures):
            self._ship(number, capture, weights[number])
        replay = DenseReplay(self.manifest, lambda i: self._opened(i, weights[i]), torch.device("cpu"))
        exact = self._smoothed(self.needed(replay, weights, self._slice(captures), first))
        fire = self._fires.not_before(first.version, first.tick)
        decoded = []
        for number, (encoder, parts) in enumerate(zip(self._encoders, exact, strict=True)):
            packet = encoder.encode(parts)
            about = first.version, first.tick, first.tick, fire, first.lineage
            payload = to_bytes(Correction(*about, packet, digest_of(packet)))
            self.count(FrameKind.CORRECTION, first.tick, number, "down", payload)
            message, correcting = from_bytes(Correction, payload), self._chain.stages[number].correcting
            assert correcting is not None
            correcting.check(message)
            correcting.hold(message)
            decoded.append(corrections.decode(packet, self._spec, self.shapes[number]))
        return cosine(decoded, exact)

    def needed(self, replay: DenseReplay, weights: Gradients, batch: Batch, capture: Capture) -> Gradients:
        """What the merger needs of a snapshot, whose weights are those that `replay` opens."""
        return replay.needed(batch, self.bases(capture.basis_version), tick=capture.tick)

    def _opened(self, number: int, weights: Sequence[Tensor]) -> Stage:
        return stage_with(self._model_path, self.manifest.spans[number], weights)

    def _smoothed(self, new: Gradients) -> Gradients:
        means: Sequence[list[Tensor] | None] = self._means or [None] * len(new)
        beta = self.manifest.config.corrections.beta_anc
        self._means = [smooth(mean, parts, beta) for mean, parts in zip(means, new, strict=True)]
        return self._means

    def bases(self, version: int) -> dict[Key, Basis]:
        return {key: basis for stage in self._chain.stages for key, basis in stage.bases.get(version, {}).items()}

    # What crosses ------------------------------------------------------------------------------------------------------

    def _ship(self, number: int, capture: Capture, weights: list[Tensor]) -> None:
        """A stage's weights, as a delta against its last ones. What is decoded is what was sent, bit for bit."""
        packet = weight_delta.encode(weights, self._held[number])
        self._held[number] = weights
        about = capture.version, capture.tick, capture.lineage, capture.version - 1, len(packet), 0
        payload = to_bytes(Snapshot(*about, packet, digest_of(packet)))
        self.count(FrameKind.SNAPSHOT, capture.tick, number, "up", payload)

    def _slice(self, captures: Sequence[Capture]) -> Batch:
        """What the tick consumed: from stage 0 the sequences, from the last one the log-probs of their score pass."""
        vocab, ends = self.manifest.vocab, sorted({0, len(captures) - 1})
        got = []
        for number in ends:
            capture = captures[number]
            payload = to_bytes(slice_message(capture.slice, capture.scored, vocab))
            self.count(FrameKind.SLICE, capture.tick, number, "up", payload)
            got.append(from_bytes(Slice, payload))
        return read_slice(got[0], got[-1], self.manifest.config.swarm.microbatch_size, vocab)

    def count(self, kind: FrameKind, tick: int, number: int, direction: str, payload: bytes) -> None:
        self._chain.count(kind, tick, f"anchor-stage{number}", direction, len(payload))


def cosine(a: Gradients, b: Gradients) -> float:
    """Of two gradients over all stages; 0 where one of them is zero."""
    x, y = (torch.cat([t.flatten().double() for part in parts for t in part]) for parts in (a, b))
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 0 else 0.0
