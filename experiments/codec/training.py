"""One training run in one thread: the swarm's own lead, stages, gate, calibrator and sampler in a fixed order. No evaluation.

What depends on the clock in a swarm is settled here the same way every time: rollouts are there as soon as they are
ordered, and a basis made of the sketches of a tick is held by all stages before the next batch begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anchor_node.calibrator import BasisKeeper
from anchor_node.serve import keeper_of
from codec.spec import Direction
from experiments.codec.chain import Chain
from swarm_core.config import RunConfig
from swarm_core.data.dataset import load_rows
from swarm_core.learning.rewards import resolve as resolve_reward
from swarm_core.manifest import make_manifest
from swarm_core.models.architecture import fingerprint, read_shape, resolve
from swarm_core.wire.bases import matrix_of
from swarm_core.wire.messages import (
    BasisSet,
    Decide,
    FrameKind,
    Mode,
    Outcome,
    Report,
    Rollouts,
    Sketch,
    StageVote,
    from_bytes,
    to_bytes,
)
from swarm_core.wire.rollouts import read_rollouts, rollouts_message
from swarm_worker.journal import Journal
from swarm_worker.lead import LeadState
from swarm_worker.sampler.source import SamplerArguments, Source
from swarm_worker.sampler.verify import Call, Verdict
from swarm_worker.schedule import Stamp
from swarm_worker.sketching import METRIC, SketchOut
from swarm_worker.stage_zero import StageZero


class DirectVerifier:
    """The reward function called where it stands: a study's own reward needs no process around it."""

    def __init__(self, reward: str) -> None:
        self._function = resolve_reward(reward)

    def score(self, calls: Sequence[Call]) -> list[Verdict]:
        verdicts = []
        for call in calls:
            columns = {name: [value] for name, value in call.columns.items()}
            (reward,) = self._function(prompts=[call.prompt], completions=[call.completion], **columns)
            verdicts.append(Verdict(reward, "declined" if reward is None else "scored"))
        return verdicts

    def close(self) -> None:
        """As a pool has it; there is nothing to end."""


class Training:
    """A run of `config`, whose journal and samples go to `folder`."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.model_path = resolve(config.model.path)
        self.manifest = make_manifest(config, read_shape(self.model_path), fingerprint(self.model_path))
        self.chain = Chain(self.manifest, self.model_path)
        first = self.chain.stages[0]
        journal = Journal(folder / "journal.jsonl", 0)
        self.zero = StageZero(self.manifest, first.loss_spec, first.dtype, journal, LeadState(), None, {})
        self.source = Source(self.manifest, SamplerArguments(anchor="", out=folder))
        if not self.source.replaying:
            self.source.verifier = self.source.collector.verifier = DirectVerifier(config.data.reward)
        self.keeper: BasisKeeper | None = None
        self.bases: BasisSet | None = None
        self.ticks: list[Report] = []
        if self.manifest.boundaries and self.manifest.link().basis_direction(Direction.FORWARD) is not None:
            self.keeper = keeper_of(self.manifest, self.model_path, load_rows(config.data.train), None)
            self.broadcast(self.keeper.current)

    def run(self) -> None:
        """To the last tick, or to the end of the recording."""
        while not self.zero.lead.finished:
            self.advance()

    def advance(self) -> None:
        """One round, or the batch that it needs first: what stage 0 does whenever nothing is under way."""
        lead = self.zero.lead
        self._order()
        if lead.hold() is not None:
            return
        batch, _ = self.zero.next_batch(self.chain.newest_basis)
        if batch is not None:
            self.chain.add_batch(batch)
            self._order()  # with overlap, the next batch comes from the weights that this one starts on
        stamp = lead.next_round(self.chain.corrections_held(0))
        if stamp is None:
            return
        match stamp.mode:
            case Mode.TRAIN:
                self._tick(stamp)
            case Mode.PROBE:
                self.chain.probe(stamp)
            case _:
                self.chain.score(stamp)

    def close(self) -> None:
        self.source.close()

    def _order(self) -> None:
        """Generate the batch that the lead orders, with the weights published last, as the sampler does."""
        order = self.zero.lead.next_order()
        if order is None:
            return
        if not self.source.replaying and self.source.version < order.weight_version:
            for stage in self.chain.stages:
                self.source.load_weights(stage.published[order.weight_version], order.weight_version)
        collected = self.source.collect(order)
        if collected is None:
            self.zero.lead.sampler_exhausted()
            return
        payload = to_bytes(rollouts_message(collected.rollouts))
        self.zero.take_rollouts(read_rollouts(from_bytes(Rollouts, payload), self.manifest.vocab))

    def _tick(self, stamp: Stamp) -> None:
        stages = self.chain.stages
        tokens = sum(stages[0].batches[stamp.batch].layout(stamp.slice, i).tokens for i in range(stamp.microbatches))
        tallies = self.chain.train(stamp)
        votes = [
            StageVote(
                number,
                not tally.fault,
                stages[number].newest_basis,
                tally.norms,
                tally.numbers,
                tally.fault,
                sorted(self.chain.corrections_held(number)),
            )
            for number, tally in enumerate(tallies)
        ]
        decide, row = self.zero.decide(stamp, votes, any(tally.gated for tally in tallies), tokens)
        self.ticks.append(row)
        sketches = [sketch for stage in stages for sketch in self._applied(stage.span.stage, stamp, decide)]
        for sketch in sketches:
            self._take_sketch(stamp, sketch)
        self.ticked(stamp)

    def ticked(self, stamp: Stamp) -> None:
        """A tick is over on all stages: the place of what a study adds."""

    def _applied(self, number: int, stamp: Stamp, decide: Decide) -> list[SketchOut]:
        stage = self.chain.stages[number]
        sketches = stage.apply(stamp, decide)
        if decide.publish:
            stage.publish(stamp.tick + (decide.outcome is not Outcome.HOLD))
        return sketches

    # The anchor's side -------------------------------------------------------------------------------------------------

    def _take_sketch(self, stamp: Stamp, out: SketchOut) -> None:
        assert self.keeper is not None
        matrix = matrix_of((out.boundary, out.direction), out.v_HR)
        numbers = (out.part, out.trace, out.rows_seen, out.packet_bytes)
        payload = to_bytes(Sketch(out.version, stamp.tick, matrix, *numbers))
        sender = out.boundary + (out.direction is Direction.BACKWARD or out.part == METRIC)
        self.chain.count(FrameKind.SKETCH, stamp.tick, f"anchor-stage{sender}", "up", len(payload))
        new = self.keeper.add(from_bytes(Sketch, payload))
        if new is not None:
            self.refreshed(stamp, new)

    def refreshed(self, stamp: Stamp, bases: BasisSet) -> None:
        """The sketches of a tick have become a new version."""
        self.broadcast(bases)

    def broadcast(self, bases: BasisSet) -> None:
        """To every stage, and whole to the sampler, which evaluates the compressed pipeline."""
        self.bases = bases
        self.chain.add_bases(bases)
        payload = to_bytes(bases)
        self.chain.count(FrameKind.BASIS, bases.tick, "anchor-sampler", "down", len(payload))
        self.source.hold_bases(from_bytes(BasisSet, payload))
