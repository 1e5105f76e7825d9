"""One end of a link, on a stage: rows to packets and back under the pinned basis, and what both ends keep to do it.

Here the codec meets the round: which basis a batch is pinned to, which rows cross, what reuse deltas refer to, what is
sketched for the next basis and measured for the metrics. No layer, loss or frame is known here.

Suffixes: U rows of a microbatch that cross (learning/crossing.py), H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codec.basis import Basis
from codec.errors import BasisMismatch
from codec.fit import rms_weights
from codec.link_codec import LinkCodec
from codec.reuse import ReuseRows, ReuseStore
from codec.spec import Direction, LinkSpec, dense_bytes
from swarm_core.learning.crossing import Crossing
from swarm_core.learning.objective import packet_seed
from swarm_core.manifest import Manifest
from swarm_core.wire.messages import Mode
from swarm_worker.fidelity import exact
from swarm_worker.schedule import COMPRESSED, DENSE, Stamp
from swarm_worker.size_watch import SizeWatch
from swarm_worker.sketching import Sketcher

# Rows of a packet that sketches and measures look at, which bounds what they cost beside the codec. A mean of errors
# needs fewer than a moment of R directions.
SKETCHED_ROWS, MEASURED_ROWS = 512, 128
MIB = 1 << 20

Bases = dict[int, dict[tuple[int, Direction], Basis]]


@dataclass(frozen=True)
class Packet:
    """Bytes for a neighbour, and what the tensor would have cost in bf16."""

    payload: bytes
    dense_bytes: int


class LinkEnd:
    """The end of one boundary's link on one stage. One thread calls it.

    `bases` are all versions held. References for reuse deltas are staged while a round runs and kept or dropped at its
    end: those of a score pass are kept when the next round begins, those of a tick when it is committed (`settle`).
    """

    def __init__(self, manifest: Manifest, boundary: int, bases: Bases, sketcher: Sketcher | None) -> None:
        self.spec: LinkSpec = manifest.link()
        self.boundary = boundary
        self.codec = LinkCodec(self.spec)
        self.reuse = ReuseStore(manifest.config.links.reuse_memory_mb * MIB) if self.spec.reuse else None
        # A probe has codecs of its own: they remember whether zstd pays, and what a packet costs steers the next basis.
        self._probe_codecs = {COMPRESSED: LinkCodec(self.spec), DENSE: LinkCodec(exact(self.spec))}
        self.sizes = SizeWatch()  # of the activations that come
        self._bases = bases
        self._sketcher = sketcher
        self._seed = manifest.config.run.seed
        self._scoring: Stamp | None = None  # the score pass whose references are staged
        self._measures: dict[str, list[tuple[Tensor, int]]] = {}

    # Rows and packets --------------------------------------------------------------------------------------------------

    def encode(self, x_UH: Tensor, direction: Direction, stamp: Stamp, crossing: Crossing, microbatch: int) -> Packet:
        """The packet of these rows. Raises NonFiniteError."""
        codec, basis = self._codec(stamp, direction, microbatch)
        rows = self._references(stamp, direction, crossing)
        seed = packet_seed(self._seed, stamp.tick, stamp.attempt, microbatch, self.boundary)
        payload = codec.encode(x_UH, direction, basis, rows=rows, seed=seed)
        if basis is not None and stamp.mode in (Mode.TRAIN, Mode.SCORE):
            self._watch_sent(direction, basis, x_UH, len(payload))
        probe = stamp.mode is Mode.PROBE  # which a dense run would not send at all
        return Packet(payload, 0 if probe else dense_bytes(self.spec.width, crossing.repeated_rows))

    def decode(
        self, packet: bytes | memoryview, direction: Direction, stamp: Stamp, crossing: Crossing, microbatch: int
    ) -> Tensor:
        """The rows of a packet, U x H. Raises PacketError, BasisMismatch, ReferenceMismatch."""
        codec, basis = self._codec(stamp, direction, microbatch)
        rows = self._references(stamp, direction, crossing)
        x_UH = codec.decode(packet, crossing.rows, direction, basis, rows=rows)
        if direction is Direction.FORWARD and stamp.mode in (Mode.TRAIN, Mode.SCORE):
            self.sizes.saw(x_UH)
        return x_UH

    def encode_whole(self, stamp: Stamp, crossing: Crossing) -> Packet:
        """The activations that `encode` made a packet of in this round, without references to earlier ones."""
        rows = self._references(stamp, Direction.FORWARD, crossing)
        assert rows is not None, "the worker refuses a RESEND on links without reuse deltas"
        payload = self.codec.encode_whole(rows, self._basis(stamp, Direction.FORWARD))
        return Packet(payload, 0)  # a dense run sends it once

    def _codec(self, stamp: Stamp, direction: Direction, microbatch: int) -> tuple[LinkCodec, Basis | None]:
        if stamp.mode is not Mode.PROBE:
            return self.codec, self._basis(stamp, direction)
        return self._probe_codecs[microbatch], None if microbatch == DENSE else self._basis(stamp, direction)

    def _basis(self, stamp: Stamp, direction: Direction) -> Basis | None:
        """The basis that this direction is coded in, of the version the batch is pinned to."""
        which = self.spec.basis_direction(direction)
        if which is None:
            return None
        if stamp.basis_version not in self._bases:
            raise BasisMismatch(stamp.basis_version, max(self._bases, default=None))
        return self._bases[stamp.basis_version][(self.boundary, which)]

    # References of reuse deltas ----------------------------------------------------------------------------------------

    def _references(self, stamp: Stamp, direction: Direction, crossing: Crossing) -> ReuseRows | None:
        if self.reuse is None or direction is Direction.BACKWARD or stamp.mode not in (Mode.TRAIN, Mode.SCORE):
            return None
        if self._scoring is not None and self._scoring.key != stamp.key:
            self.settle(keep=True)
        self._scoring = stamp if stamp.mode is Mode.SCORE else None
        return self.reuse.rows(crossing.parts)

    def settle(self, *, keep: bool) -> None:
        """What was staged becomes the reference of the next pass, or is forgotten as if it had never crossed.

        A score pass is part of no tick: what it staged is kept, also when the first tick of its batch is an empty one.
        """
        scored, self._scoring = self._scoring is not None, None
        if self.reuse is not None:
            self.reuse.settle(keep or scored)

    def forget(self) -> None:
        """The batch is over."""
        self._scoring = None
        if self.reuse is not None:
            self.reuse.forget()

    def references(self) -> dict[str, Tensor]:
        """The references held, for a checkpoint."""
        if self._scoring is not None:
            self.settle(keep=True)
        return self.reuse.state() if self.reuse is not None else {}

    def load_references(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `references` gave."""
        if self.reuse is not None:
            self.reuse.load(tensors)

    # Measures and sketches ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _watch_sent(self, direction: Direction, basis: Basis, x_UH: Tensor, packet_bytes: int) -> None:
        rows_UH = _every(x_UH, MEASURED_ROWS)
        weights_U = rms_weights(rows_UH) if direction is Direction.FORWARD else None
        encoder_HR, decoder_RH = basis.encoder_HR, basis.decoder_RH
        if self.spec.basis_direction(direction) is not direction:  # `exact` sends gradients the way back
            encoder_HR, decoder_RH = decoder_RH.T, encoder_HR.T
        total = _energy(rows_UH, weights_U)
        missed = _energy(rows_UH - rows_UH @ encoder_HR @ decoder_RH, weights_U)
        error = _energy(rows_UH - self.codec.project(rows_UH, direction, basis), weights_U)
        self._measure(f"basis/share_{direction.name.lower()}", 1.0 - missed / total, len(x_UH))
        self._measure(f"basis/error_{direction.name.lower()}", error / total, len(x_UH))
        if self._sketcher is not None and self.spec.basis_direction(direction) is direction:
            rows_UH = _every(x_UH, SKETCHED_ROWS)
            self._sketcher.watch_sent((self.boundary, direction), basis, rows_UH, len(x_UH), packet_bytes)

    @torch.no_grad()
    def watch_returned(self, stamp: Stamp, h_UH: Tensor, grad_UH: Tensor) -> None:
        """The activations that arrived and their gradients: the metric that the activation basis is fitted in."""
        basis = self._basis(stamp, Direction.FORWARD)
        if basis is not None and self._sketcher is not None and stamp.mode is Mode.TRAIN:
            rows_UH, grads_UH = _every(h_UH, SKETCHED_ROWS), _every(grad_UH, SKETCHED_ROWS)
            self._sketcher.watch_received((self.boundary, Direction.FORWARD), basis, rows_UH, grads_UH)

    def _measure(self, name: str, value: Tensor, rows: int) -> None:
        self._measures.setdefault(f"{name}/boundary_{self.boundary}", []).append((value, rows))

    def take_measures(self) -> dict[str, float]:
        """Means over the rows since the last call; what is not finite (rows without energy) is left out."""
        means = {}
        for name, values in self._measures.items():
            finite = [(float(value), rows) for value, rows in values if torch.isfinite(value)]
            if finite:
                means[name] = sum(value * rows for value, rows in finite) / sum(rows for _, rows in finite)
        self._measures = {}
        return means


def _every(x_UH: Tensor, most: int) -> Tensor:
    """Every k-th row, so that at most `most` are left."""
    return x_UH.detach()[:: -(-len(x_UH) // most) or 1].float()


def _energy(x_UH: Tensor, weights_U: Tensor | None) -> Tensor:
    energy_U = x_UH.square().sum(dim=1)
    return (energy_U if weights_U is None else energy_U * weights_U).sum()
