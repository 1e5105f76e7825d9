"""One honest frame of every kind, made by the real senders from a seed, with whom it goes to. No test is here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from codec import weight_delta
from codec.basis import Basis
from codec.corrections import CorrectionEncoder
from codec.spec import Direction
from swarm_core.config import load
from swarm_core.learning.batch import Batch, make_batch
from swarm_core.learning.microbatch import Sample
from swarm_core.learning.rollout import Completion, RolloutBatch
from swarm_core.manifest import Manifest, make_manifest
from swarm_core.models.architecture import read_shape
from swarm_core.models.reading import load_stage, tensor_shapes
from swarm_core.wire import messages as m
from swarm_core.wire.bases import Key, as_changes, matrix_of
from swarm_core.wire.corrections import correction_spec, digest_of, slice_message
from swarm_core.wire.frames import Frame, Header, address_of, run_id
from swarm_core.wire.messages import FrameKind, Mode, to_bytes
from swarm_core.wire.rollouts import batch_data, rollouts_message
from swarm_worker.headers import header_of
from swarm_worker.link_ends import LinkEnd
from swarm_worker.schedule import Stamp

TINY = Path(__file__).parents[2] / "examples" / "tiny"
VERSION, TICK, LINEAGE, BATCH = 3, 4, 9, 4  # where the run stands in which these frames are sent
STAGES = 3
COPIED, SHARD = "redo/stage-01-of-03/tick-00000000.log", "checkpoints/tick-00000008/stage-01-of-03.safetensors"
BASE = {
    "grpo.prompts_per_batch": "2", "grpo.completions_per_prompt": "4", "swarm.microbatch_size": "4", "run.ticks": "100",
    "anchor.m_cadence": "1", "anchor.snapshot": "exact", "anchor.q_cadence": "5", "links.share_prompts": "true",
}  # fmt: skip
# What crosses a link: every kind, and of `lowrank` every quantiser, both ways back, with outliers and reuse deltas.
LINKS: dict[str, dict[str, str]] = {
    "identity": {"kind": "identity"},
    "none": {"kind": "none"},
    "uniform": {"kind": "lowrank", "outliers": "1.2"},
    "exact": {"kind": "lowrank", "backward": "exact", "gradient_scale": "row", "fit": "plain"},
    "int8": {"kind": "lowrank", "quantiser_forward": "int8", "quantiser_backward": "int8", "outliers": "1.2"},
    "int4": {"kind": "lowrank", "quantiser_forward": "int4", "quantiser_backward": "int4"},
    "bf16": {"kind": "lowrank", "quantiser_forward": "bf16", "quantiser_backward": "bf16"},
}
FORMS = {
    "lowrank": {"merger": "held_delta", "form": "lowrank"},
    "topk": {"merger": "held_delta", "form": "topk"},
    "bf16": {"merger": "held_delta", "form": "bf16"},
    "sign": {"merger": "signed_ema", "form": "sign"},
}


@dataclass(frozen=True)
class Specimen:
    """An honest frame; `to` names a reader of frame_readers.py, `message` is what its payload was made of."""

    to: str
    frame: Frame
    message: object = field(default=None, compare=False)

    @property
    def name(self) -> str:
        return f"{self.to} {self.frame.header.kind.name}"


@cache
def manifest(link: str, form: str = "lowrank") -> Manifest:
    knobs = {f"links.{name}": value for name, value in LINKS[link].items()}
    knobs |= {f"corrections.{name}": value for name, value in FORMS[form].items()}
    return make_manifest(load(TINY / "run.toml", BASE | knobs), read_shape(TINY / "model"), "a0" * 32)


@cache
def batch(vocab: int) -> Batch:
    """Two slices of four sequences of two prompts."""
    generator = torch.Generator().manual_seed(5)

    def ids(n: int) -> Tensor:
        return torch.randint(3, vocab, (n,), generator=generator)

    prompts = [ids(5), ids(7)]
    slices = [
        [Sample(prompts[i % 2], c := ids(2 + i), (-1.0) ** i, torch.full((len(c),), -1.0)) for i in range(4)]
        for _ in range(2)
    ]
    made = make_batch(BATCH, 0, slices, [14, 14], [4, 4], 4, keep_groups=True)
    made.old_logprobs_M = torch.full((28,), -1.0)
    return made


def bases(of: Manifest, version: int = VERSION) -> dict[Key, Basis]:
    """A pair, and orthonormal ones, of every boundary."""
    spec, found = of.link(), {}
    if spec.kind != "lowrank":
        return {}
    generator = torch.Generator().manual_seed(version)
    for boundary in range(of.boundaries):
        for direction in Direction:
            if spec.basis_direction(direction) is direction:
                rank = spec.columns(direction)
                q_HR, _ = torch.linalg.qr(torch.randn(spec.width, rank, generator=generator))
                found[boundary, direction] = Basis.orthonormal(version, q_HR.contiguous(), 0.25)
    return found


def basis_set(of: Manifest, version: int = VERSION) -> m.BasisSet:
    matrices = [matrix_of(key, *b.to_wire(), b.step) for key, b in sorted(bases(of, version).items())]
    return m.BasisSet(version, TICK, matrices)


def stamp(of: Manifest, mode: Mode = Mode.TRAIN) -> Stamp:
    count = {Mode.TRAIN: 1, Mode.PROBE: 2}.get(mode, 2)
    return Stamp(1, TICK, 0, LINEAGE, mode, BATCH, 1, 0, count, VERSION, 0, 2)


def rows(of: Manifest, seed: int) -> Tensor:
    crossing = batch(of.vocab).crossing(0, 0, share=of.config.links.shares_prompts)
    return torch.randn(crossing.rows, of.width, generator=torch.Generator().manual_seed(seed)) * 3


class Corpus:
    """All frames. The packets of one link and the messages of one run belong together."""

    def __init__(self) -> None:
        self.specimens = [*self._links(), *self._down(), *self._up(), *self._from_anchor(), *self._corrections()]
        self.specimens += [*self._to_anchor(), *self._samplers(), *self._greetings(), *self._look()]

    @property
    def kinds(self) -> set[FrameKind]:
        return {s.frame.header.kind for s in self.specimens}

    @cached_property
    def of(self) -> Manifest:
        return manifest("uniform")

    def _one(self, to: str, kind: FrameKind, message: object = None, payload: bytes = b"", **header: int) -> Specimen:
        run = run_id(self.of.digest())
        fields = {"epoch": 1, "tick": TICK, "lineage": LINEAGE, "batch": BATCH} | header
        body = payload if message is None else to_bytes(message)
        return Specimen(to, Frame(Header(kind, run, **fields), body), message)

    def _links(self) -> list[Specimen]:
        found = []
        for name in LINKS:
            of = manifest(name)
            run = run_id(of.digest())
            end = LinkEnd(of, 0, {VERSION: bases(of)} if bases(of) else {}, None)
            crossing = batch(of.vocab).crossing(0, 0, share=of.config.links.shares_prompts)
            score, train = stamp(of, Mode.SCORE), stamp(of)
            for mode, seed in ((score, 1), (train, 1)):  # the second holds changes, where the link has reuse deltas
                x_UH = rows(of, seed) + (0.01 if mode is train else 0.0)
                packet = end.encode(x_UH, Direction.FORWARD, mode, crossing, 0).payload
                header = header_of(FrameKind.ACTIVATION, run, mode, 1)
                found.append(Specimen(f"stage, {name}", Frame(header, packet)))
            packet = end.encode(rows(of, 2) * 1e-4, Direction.BACKWARD, train, crossing, 0).payload
            found.append(Specimen(f"gradient, {name}", Frame(header_of(FrameKind.GRADIENT, run, train, 0), packet)))
        return found

    def _down(self) -> list[Specimen]:
        data = batch_data(batch(self.of.vocab), self.of.vocab)
        here = {"receiver": address_of(1)}
        decide = m.Decide(m.Outcome.COMMIT, 0.5, True, True, True, False, "")
        to = "stage, uniform"
        return [
            self._one(to, FrameKind.BATCH, data, **here),
            self._one(to, FrameKind.BEGIN, m.Begin(1, VERSION, 0, 2), **here),
            self._one(to, FrameKind.DECIDE, decide, **here),
            self._one(to, FrameKind.WARM, **here),
        ]

    def _up(self) -> list[Specimen]:
        sums = {f"correction/sum/{name}": 2.0 for name in ("gradient_sq", "dose_sq", "merged_sq", "dot")}
        votes = [m.StageVote(i, True, VERSION, [1.0, 2.0], {"entropy": 1.0} | sums, "", [1, 2]) for i in (1, 2)]
        return [
            self._one("stage 0", FrameKind.VOTE, m.Vote(votes, False), receiver=0),
            self._one("gradient, uniform", FrameKind.RESEND, receiver=0),
        ]

    def _from_anchor(self) -> list[Specimen]:
        whole, older = basis_set(self.of), basis_set(self.of, VERSION - 1)
        near = replace(older, version=VERSION)  # nearly the version before, so that changes are smaller
        near.matrices = [replace(x, step=0.5) for x in older.matrices]
        start = m.Start(1, [f"10.0.0.{i}:7400" for i in range(STAGES)], "tick-00000004", {0: "d0", 1: "d1"})
        to = "from the anchor"
        return [
            self._one(to, FrameKind.WELCOME, m.Welcome(self.of.to_json(), self.of.digest(), 1, 7)),
            self._one(to, FrameKind.BASIS, whole),
            self._one(to, FrameKind.BASIS, as_changes(near, older)),
            self._one(to, FrameKind.START, start),
            self._one(to, FrameKind.STOP, m.Stop("it is over", True)),
            self._one(to, FrameKind.SNAPSHOT_HELD, m.SnapshotHeld(2, 100, False, "")),
            self._one(to, FrameKind.BOOKED, m.Booked(3)),
            self._one(to, FrameKind.COPY_HELD, m.CopyHeld(COPIED, 100, 7, False, "")),
            self._one(to, FrameKind.COPIES, m.Copies(7, [m.CopyHeld(COPIED, 100, 7), m.CopyHeld(COPIED, 9, 8)])),
            self._one(to, FrameKind.COPY, m.Copy(COPIED, 0, part=b"bytes")),
            self._one(to, FrameKind.FENCE, m.Fence(2, "stage 1 is gone")),
            self._one(to, FrameKind.CHECK, m.Check("tick-00000004", "d1" * 32)),
            self._one(to, FrameKind.BEAT, m.Beat(10.0, 9.0, 0.5, "at work", "the vote of stage 2", 3.0)),
        ]

    def _look(self) -> list[Specimen]:
        tried = m.Tried(1.0, 1, {"torch": "2.13.0"}, "10.0.0.1:7401", "run", "at work", 0, "")
        to = "doctor and status"
        return [
            self._one(to, FrameKind.STATUS, m.Status("{}")),
            self._one(to, FrameKind.TRIAL, m.Trial("echo", 100, 7401, b"12345678")),
            self._one(to, FrameKind.TRIED, tried),
            self._one(to, FrameKind.LOAD, payload=bytes(100)),
        ]

    def _corrections(self) -> list[Specimen]:
        found = []
        for form in FORMS:
            of = manifest("uniform", form)
            shapes = [tuple(shape) for shape in tensor_shapes(read_shape(TINY / "model"), of.spans[1]).values()]
            generator = torch.Generator().manual_seed(7)
            tensors = [torch.randn(shape, generator=generator) * 1e-3 for shape in shapes]
            packet = CorrectionEncoder(correction_spec(of.config), shapes).encode(tensors)
            message = m.Correction(2, 2, 3, 4, LINEAGE, packet, digest_of(packet))
            found.append(replace(self._one("", FrameKind.CORRECTION, message), to=f"correction, {form}"))
        return found

    def _to_anchor(self) -> list[Specimen]:
        ledger = [m.LedgerRow(TICK, "stage0-stage1", "down", "activation", 9, 8, 7, 6, 5)] * 3
        ticked = m.Report("tick", TICK, {"reward": 0.5, "lr": 1e-3}, {"outcome": "commit"}, ledger, 3)
        words = {"event": "finished", "message": "done", "checkpoint": "tick-00000004", "evaluation": "no"}
        weights = list(load_stage(TINY / "model", self.of.spans[1]).values())
        whole = weight_delta.encode(weights, None)
        moved = weight_delta.encode([w + 1e-3 * (i % 2) for i, w in enumerate(weights)], weights)
        part = batch(self.of.vocab).only(0)
        first, last = slice_message(part, None, self.of.vocab), slice_message(None, part, self.of.vocab)
        for each in (first, last):
            each.version, each.tick, each.lineage, each.basis_version, each.reuse = TICK + 1, TICK, LINEAGE, VERSION, 1
        moment = m.Sketch(
            VERSION, TICK, matrix_of((1, Direction.FORWARD), rows(self.of, 3)[:1].T.repeat(1, 48)), 0, 9.0, 50, 200
        )
        to = "anchor"
        return [
            self._one(to, FrameKind.READY, m.Ready(1000, 4000, "a0" * 32)),
            self._one(to, FrameKind.REPORT, ticked),
            self._one(to, FrameKind.REPORT, m.Report("event", TICK, words=words, number=4)),
            self._one(to, FrameKind.SAVED, m.Saved(4, "tick-00000004", "stage-01-of-03.safetensors", "d1", 99)),
            self._one(to, FrameKind.SKETCH, moment),
            self._one(to, FrameKind.SNAPSHOT, m.Snapshot(5, TICK, LINEAGE, 0, len(whole), 0, whole, digest_of(whole))),
            self._one(to, FrameKind.SNAPSHOT, m.Snapshot(6, 5, LINEAGE, 5, len(moved), 0, moved, digest_of(moved))),
            self._one("anchor, of stage 0", FrameKind.SLICE, first),
            self._one("anchor, of stage 2", FrameKind.SLICE, last),
            self._one(to, FrameKind.COPY, m.Copy(COPIED, 0, 0, b"bytes", "", 0, 3, 0)),
            self._one(to, FrameKind.COPY, m.Copy(SHARD, 0, 0, b"bytes", "d1" * 32, 0, 0, 8)),
            self._one(to, FrameKind.COPIES, m.Copies(7, epoch=1, tick=3)),
            self._one(to, FrameKind.COPY_WANTED, m.CopyWanted(COPIED, 3)),
            self._one(to, FrameKind.STOP, m.Stop("asked to", False)),
            self._one(to, FrameKind.FENCE, m.Fence(9, "stage 2 is gone")),
            self._one(to, FrameKind.CHECKED, m.Checked("tick-00000004", "it is damaged")),
            self._one(to, FrameKind.HELD, m.Held(9, 7, [3, 4], [5, 6], [7, 8], m.Decide(m.Outcome.COMMIT, 0.5))),
            self._one(
                "anchor, of a sampler", FrameKind.REPORT, m.Report("eval", TICK, {"eval/accuracy": 0.5}, number=1)
            ),
        ]

    def _samplers(self) -> list[Specimen]:
        completions = [
            Completion(
                i // 4, [3, 4, 5 + i // 4], [6, 7, 8][: 1 + i % 3], [-1.0, -2.0, -0.5][: 1 + i % 3], float(i % 2), False
            )
            for i in range(8)
        ]
        rollouts = rollouts_message(RolloutBatch(0, 0, 4, completions))
        state = save({"model.norm.weight": torch.ones(96), "lm_head.weight": torch.ones(18, 96)})
        return [
            self._one("feed", FrameKind.ROLLOUTS, rollouts),
            self._one("feed", FrameKind.FETCH, m.Fetch(4)),
            self._one("sampler", FrameKind.ORDER, m.Order(1, 2, True, False)),
            self._one("sampler", FrameKind.WEIGHTS, payload=state),
        ]

    def _greetings(self) -> list[Specimen]:
        hello = m.Hello("stage", 1, 0, "10.0.0.1:7401", versions={"torch": "2.13.0"}, member=77)
        return [
            self._one("greeting", FrameKind.HELLO, hello),
            self._one("greeting", FrameKind.HELLO, replace(hello, role="sampler")),
        ]
