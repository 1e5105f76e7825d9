"""Which frames a stage takes from its neighbours, and how large they may be: the checks that come before any work.

Run, epoch, addressee and lineage; batches and microbatches that exist; the most a tensor can take, from the layout of
its microbatch, before a byte is allocated for it. No stream and no tensor here.
"""

from __future__ import annotations

from dataclasses import replace

from codec.spec import Direction, LinkSpec, largest_packet_bytes
from swarm_core.knobs import LinksSection
from swarm_core.learning.batch import Batch
from swarm_core.learning.errors import MicrobatchError
from swarm_core.wire.errors import BadFrame, ManifestMismatch, StaleEpoch
from swarm_core.wire.frames import MAX_MESSAGE_BYTES, Frame, Header, address_of
from swarm_core.wire.messages import Begin, Decide, FrameKind, Mode, Outcome, from_bytes
from swarm_worker.fidelity import exact
from swarm_worker.headers import Position, identity
from swarm_worker.schedule import CROSSINGS, Stamp

BATCH_LIMIT = 256 << 20  # a few million tokens


class Admission:
    """One stage's view of what may arrive. `batches` are those announced and not yet ended."""

    def __init__(
        self, stage: int, run: int, link: LinkSpec, links: LinksSection, position: Position, batches: dict[int, Batch]
    ) -> None:
        self.stage, self.run, self.epoch, self.link = stage, run, position.epoch, link
        self.batches = dict(batches)
        self._exact = exact(link)
        self._share = links.shares_prompts
        self._probe_sequences = links.fidelity_sequences
        self._lineage = position.lineage  # that the next round must build on: a decision counts once it has arrived

    def check(self, header: Header) -> None:
        """Raises ManifestMismatch, StaleEpoch, BadFrame."""
        if header.run != self.run:
            raise ManifestMismatch(f"a frame of run {header.run:016x} arrived in run {self.run:016x}")
        if header.epoch != self.epoch:
            raise StaleEpoch(f"a frame of epoch {header.epoch} arrived in epoch {self.epoch}")
        if header.receiver != address_of(self.stage):
            raise BadFrame(f"a frame for stage {header.receiver >> 16} arrived at stage {self.stage}")

    def largest(self, direction: Direction, header: Header) -> int:
        """The largest payload this frame may have: for a tensor, the most its microbatch can make it."""
        if header.kind is FrameKind.BATCH:
            return BATCH_LIMIT
        if header.kind in (FrameKind.RESEND, FrameKind.WARM):
            return 0
        if header.kind not in (FrameKind.ACTIVATION, FrameKind.GRADIENT):
            return MAX_MESSAGE_BYTES
        batch, link = self._batch(header), self.link
        slice_, microbatch = header.slice, header.microbatch
        try:
            if header.mode is Mode.PROBE:
                link = (self.link, self._exact)[microbatch]
                batch, slice_, microbatch = batch.probe(slice_, self._probe_sequences), 0, 0
            elif header.mode is not Mode.TRAIN:
                slice_, microbatch = batch.place(microbatch)
            rows = batch.crossing(slice_, microbatch, share=self._share).rows
        except (MicrobatchError, IndexError):
            raise BadFrame(
                f"{header.kind.name} {header.microbatch} of slice {header.slice}: batch {header.batch} has no such one"
            ) from None
        return largest_packet_bytes(link, direction, rows)

    def stamp(self, frame: Frame) -> Stamp:
        """The stamps of a BEGIN. Raises ManifestMismatch for another history, BadFrame for a round that cannot be."""
        h, begin = frame.header, from_bytes(Begin, frame.payload)
        if h.lineage != self._lineage:
            raise ManifestMismatch(
                f"tick {h.tick} builds on lineage {h.lineage:016x}, stage {self.stage} holds "
                f"{self._lineage:016x}: they do not share a history"
            )
        counts = self._batch(h).microbatches
        if h.slice >= len(counts) or begin.microbatches != _microbatches(h.mode, counts, h.slice):
            round_ = f"{h.mode.name} of tick {h.tick}, slice {h.slice}"
            raise BadFrame(f"{round_}, has {begin.microbatches} microbatches; here: {counts}")
        return replace(
            identity(h),
            microbatches=begin.microbatches,
            basis_version=begin.basis_version,
            correction=begin.correction,
            step=begin.step,
        )

    def decision(self, frame: Frame) -> Decide:
        """A DECIDE. Raises BadFrame for a coefficient that clipping cannot give: it multiplies every gradient."""
        decide = from_bytes(Decide, frame.payload)
        if not 0.0 <= decide.coefficient <= 1.0:
            raise BadFrame(f"tick {frame.header.tick} was decided with coefficient {decide.coefficient}; wanted 0 to 1")
        return decide

    def decided(self, header: Header, decide: Decide) -> None:
        """A decision has arrived: the next round must build on it. A HOLD is about no round."""
        if decide.outcome != Outcome.HOLD:
            self._lineage = Position(header.tick, header.lineage, header.epoch).after(identity(header), decide).lineage

    def ended(self, batch: int) -> None:
        """No frame is about this batch any more."""
        self.batches.pop(batch, None)

    def _batch(self, header: Header) -> Batch:
        try:
            return self.batches[header.batch]
        except KeyError:
            raise BadFrame(
                f"{header.kind.name} of batch {header.batch}; stage {self.stage} holds {sorted(self.batches)}"
            ) from None


def _microbatches(mode: Mode, counts: tuple[int, ...], slice_: int) -> int:
    """How many a round of this mode has, in a batch whose slices have `counts`."""
    if mode is Mode.TRAIN:
        return counts[slice_]
    if mode is Mode.PROBE:
        return CROSSINGS if counts[slice_] else 0
    return sum(counts)
