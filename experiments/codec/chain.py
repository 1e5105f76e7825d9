"""All stages of a run in one thread, joined by their real packets and by a byte ledger. Decides nothing and samples nothing.

Every tensor crosses a boundary as the bytes that `StageCompute` made of it, batches and bases as their frames' payloads,
and each is counted as the wire would count it. What is left out is what cannot change a weight: sockets and threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from anchor_node.calibrator import part_for_stage
from swarm_core.learning.batch import Batch
from swarm_core.manifest import Manifest
from swarm_core.wire.frames import message_bytes
from swarm_core.wire.ledger import Ledger
from swarm_core.wire.messages import BasisSet, BatchData, FrameKind, Mode, from_bytes, to_bytes
from swarm_core.wire.rollouts import batch_data, read_batch
from swarm_worker.compute import Packet, StageCompute, Tally
from swarm_worker.membership import read_bases
from swarm_worker.schedule import Stamp


class Chain:
    """The stages of `manifest` with the weights at `model_path`, first to last."""

    def __init__(self, manifest: Manifest, model_path: Path) -> None:
        self.manifest = manifest
        self.stages = [StageCompute(manifest, span.stage, model_path, torch.device("cpu")) for span in manifest.spans]
        self.ledger = Ledger()
        self.rows = {FrameKind.ACTIVATION: 0, FrameKind.GRADIENT: 0}  # rows x links that crossed, by direction

    # What comes in between rounds --------------------------------------------------------------------------------------

    def add_batch(self, batch: Batch) -> None:
        """Stage 0 holds the batch itself; the others what its BATCH frame carries."""
        payload = to_bytes(batch_data(batch, self.manifest.vocab))
        self.stages[0].add_batch(batch)
        for stage in self.stages[1:]:
            data = from_bytes(BatchData, payload)
            stage.add_batch(read_batch(data, batch.microbatch_size, self.manifest.vocab))

    def add_bases(self, bases: BasisSet) -> None:
        """A BASIS frame to every stage, with the boundaries on either side of it."""
        for stage in self.stages:
            number = stage.span.stage
            payload = to_bytes(part_for_stage(bases, number))
            self.count(FrameKind.BASIS, bases.tick, f"anchor-stage{number}", "down", len(payload))
            stage.add_bases(bases.version, read_bases(from_bytes(BasisSet, payload), self.manifest, number))

    @property
    def newest_basis(self) -> int:
        """The newest version that all stages hold."""
        return min(stage.newest_basis for stage in self.stages)

    def corrections_held(self, stage: int) -> dict[int, tuple[int, int]]:
        """(snapshot tick, first tick to merge it in) of the anchor's corrections that a stage holds, by version."""
        correcting = self.stages[stage].correcting
        return {} if correcting is None else correcting.held

    def weights(self) -> dict[str, Tensor]:
        """All parameters by their checkpoint names: the stages' own, not copies."""
        parts = [zip(stage.names, stage.parameters, strict=True) for stage in self.stages]
        return {name: parameter.detach() for part in parts for name, parameter in part}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.weights().items():
            parameter.copy_(weights[name])

    # Rounds ------------------------------------------------------------------------------------------------------------

    def score(self, stamp: Stamp) -> None:
        """A forward-only round: SCORE, or REFERENCE."""
        for microbatch in range(stamp.microbatches):
            packet = None
            for stage in self.stages:
                packet = self._sent(FrameKind.ACTIVATION, stamp, stage, stage.score(stamp, microbatch, packet))

    def train(self, stamp: Stamp) -> list[Tally]:
        """Forward, loss and backward of a tick, one microbatch after the other; what each stage says of it."""
        self._forward_and_backward(stamp)
        return [stage.tally(stamp) for stage in self.stages]

    def probe(self, stamp: Stamp) -> None:
        """The few sequences that a swarm compares with and without compression: what is found goes with the next vote."""
        self._forward_and_backward(stamp)
        for stage in self.stages:
            stage.compare(stamp)

    def _forward_and_backward(self, stamp: Stamp) -> None:
        *before, last = self.stages
        for microbatch in range(stamp.microbatches):
            packet = None
            for stage in before:
                packet = self._sent(FrameKind.ACTIVATION, stamp, stage, stage.forward(stamp, microbatch, packet))
            packet = self._sent(FrameKind.GRADIENT, stamp, last, last.loss(stamp, microbatch, packet))
            for stage in reversed(before):
                assert packet is not None
                packet = self._sent(FrameKind.GRADIENT, stamp, stage, stage.backward(stamp, microbatch, packet))

    # Bytes -------------------------------------------------------------------------------------------------------------

    def count(
        self,
        kind: FrameKind,
        tick: int,
        link: str,
        direction: str,
        payload: int,
        dense: int = 0,
        mode: Mode = Mode.TRAIN,
    ) -> None:
        """A frame of `payload` bytes; `dense` is the bf16 size of the rows in it, 0 where there are none."""
        message = message_bytes(payload)
        self.ledger.count(tick, link, direction, kind, mode, dense=dense, packet=payload, message=message)

    def _sent(self, kind: FrameKind, stamp: Stamp, stage: StageCompute, packet: Packet | None) -> bytes | None:
        if packet is None:
            return None
        down = kind is FrameKind.ACTIVATION
        upper = stage.span.stage - (not down)
        link = f"stage{upper}-stage{upper + 1}"
        self.count(
            kind, stamp.tick, link, "down" if down else "up", len(packet.payload), packet.dense_bytes, stamp.mode
        )
        self.rows[kind] += packet.dense_bytes // (2 * self.manifest.width)
        return packet.payload
