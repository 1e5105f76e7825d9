"""What a stage lets in: sizes known before a byte is allocated, and rounds that can be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from codec.basis import Basis
from codec.link_codec import LinkCodec
from codec.spec import Direction, LinkSpec, packet_bytes
from swarm_core.knobs import LinksSection
from swarm_core.learning.batch import Batch, make_batch
from swarm_core.learning.microbatch import Sample
from swarm_core.wire.errors import BadFrame, ManifestMismatch, StaleEpoch
from swarm_core.wire.frames import Frame, Header, address_of
from swarm_core.wire.messages import Begin, Decide, FrameKind, Mode, Outcome, to_bytes
from swarm_worker.admission import Admission
from swarm_worker.fidelity import exact
from swarm_worker.headers import Position
from swarm_worker.schedule import COMPRESSED, DENSE

RUN, STAGE, WIDTH = 77, 1, 8
LINK = LinkSpec("none", WIDTH, zstd="off")


def batch() -> Batch:
    """Two prompts of 3 and 5 tokens; slices of 4, 0 and 3 sequences in microbatches of 3."""

    def sample(prompt: int, completion: int) -> Sample:
        ids = torch.arange(prompt + completion)
        return Sample(ids[:prompt], ids[prompt:], 1.0, torch.zeros(completion))

    slices = [[sample(3, 2), sample(3, 4), sample(5, 6), sample(5, 8)], [], [sample(3, 1), sample(5, 1), sample(5, 9)]]
    return make_batch(4, 0, slices, [20, 0, 11], [4, 1, 3], 3)


def admission(link: LinkSpec = LINK, **knobs: Any) -> Admission:
    links = LinksSection(**({"kind": link.kind, "fidelity_sequences": 2} | knobs))
    return Admission(STAGE, RUN, link, links, Position(tick=6, lineage=9), {4: batch()})


def header(kind: FrameKind = FrameKind.ACTIVATION, **fields: Any) -> Header:
    return Header(
        kind, RUN, **({"epoch": 1, "tick": 6, "lineage": 9, "batch": 4, "receiver": address_of(STAGE)} | fields)
    )


def begin(microbatches: int, **fields: Any) -> Frame:
    return Frame(header(FrameKind.BEGIN, **fields), to_bytes(Begin(microbatches, 3, 0, 5)))


@pytest.mark.parametrize(
    ("mode", "slice_", "microbatch", "rows"),
    [
        (Mode.TRAIN, 0, 0, 5 + 7 + 11),
        (Mode.TRAIN, 0, 1, 13),
        (Mode.TRAIN, 2, 0, 4 + 6 + 14),
        (Mode.SCORE, 0, 2, 4 + 6 + 14),
        (Mode.PROBE, 0, COMPRESSED, 7 + 13),  # the second and the fourth of four
        (Mode.PROBE, 2, COMPRESSED, 4 + 14),  # the first and the third of three
    ],
)
def test_a_tensor_has_exactly_the_size_that_its_microbatch_makes_it(
    mode: Mode, slice_: int, microbatch: int, rows: int
) -> None:
    for kind, direction in ((FrameKind.ACTIVATION, Direction.FORWARD), (FrameKind.GRADIENT, Direction.BACKWARD)):
        h = header(kind, mode=mode, slice=slice_, microbatch=microbatch)
        assert admission().largest(direction, h) == packet_bytes(LINK, direction, rows)


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_the_dense_half_of_a_probe_has_room_for_its_rows_as_they_are(dtype: Any) -> None:
    link = LinkSpec("identity", WIDTH, dtype=dtype)
    h = header(mode=Mode.PROBE, microbatch=DENSE)
    rows_NH = torch.randn(20, WIDTH, dtype=torch.float64 if dtype == "fp64" else torch.float32)
    packet = LinkCodec(exact(link)).encode(rows_NH, Direction.FORWARD)
    assert len(packet) <= admission(link).largest(Direction.FORWARD, h)
    assert admission().largest(Direction.FORWARD, h) == packet_bytes(LinkSpec("identity", WIDTH), Direction.FORWARD, 20)


@pytest.mark.parametrize("quantiser", ["bf16", "int8", "int4", "uniform"])
def test_a_packet_with_outliers_has_room(quantiser: Any) -> None:
    link = LinkSpec("lowrank", WIDTH, 2, 2, zstd="off", quantiser_forward=quantiser, outliers=2.0)
    rows_NH = torch.randn(23, WIDTH, generator=torch.Generator().manual_seed(0))
    rows_NH[7] *= 100.0
    basis = Basis.orthonormal(0, torch.eye(WIDTH)[:, :2], step=0.5)
    packet = LinkCodec(link).encode(rows_NH, Direction.FORWARD, basis)
    assert len(packet) <= admission(link, share_prompts=False).largest(Direction.FORWARD, header())


def test_rows_of_a_prompt_are_counted_once_where_they_are_shared() -> None:
    link = LinkSpec("lowrank", WIDTH, 4, 4, zstd="off")
    h = header(slice=2)
    shared, repeated = (admission(link, share_prompts=share).largest(Direction.FORWARD, h) for share in (True, False))
    assert repeated == packet_bytes(link, Direction.FORWARD, 24)
    assert shared == packet_bytes(link, Direction.FORWARD, 24 - 5)  # the prompt of 5 stands in two sequences


@pytest.mark.parametrize(
    "fields",
    [
        {"batch": 5},
        {"slice": 3},
        {"slice": 1},
        {"microbatch": 2},
        {"mode": Mode.SCORE, "microbatch": 3},
        {"mode": Mode.PROBE, "microbatch": 2},
        {"mode": Mode.PROBE, "slice": 1},
        {"mode": Mode.PROBE, "slice": 2**32 - 1},
    ],
)
def test_a_tensor_of_what_does_not_exist_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(BadFrame, match="batch 4 has no such one|stage 1 holds"):
        admission().largest(Direction.FORWARD, header(**fields))


def test_a_request_to_send_again_has_no_payload() -> None:
    assert admission().largest(Direction.BACKWARD, header(FrameKind.RESEND)) == 0


@pytest.mark.parametrize(("mode", "slice_", "microbatches"), [
    (Mode.TRAIN, 0, 2), (Mode.TRAIN, 1, 0), (Mode.SCORE, 0, 3), (Mode.REFERENCE, 0, 3), (Mode.PROBE, 2, 2),
])  # fmt: skip
def test_a_round_that_can_be(mode: Mode, slice_: int, microbatches: int) -> None:
    stamp = admission().stamp(begin(microbatches, mode=mode, slice=slice_, pass_=2))
    assert (stamp.mode, stamp.slice, stamp.pass_, stamp.microbatches) == (mode, slice_, 2, microbatches)
    assert (stamp.basis_version, stamp.step, stamp.tick, stamp.lineage) == (3, 5, 6, 9)


@pytest.mark.parametrize(
    ("mode", "slice_", "microbatches"),
    [
        (Mode.TRAIN, 0, 1),
        (Mode.TRAIN, 3, 0),
        (Mode.SCORE, 0, 2),
        (Mode.PROBE, 0, 1),
        (Mode.PROBE, 0, 3),
        (Mode.PROBE, 1, 2),
    ],
)
def test_a_round_that_cannot_be(mode: Mode, slice_: int, microbatches: int) -> None:
    with pytest.raises(BadFrame, match="microbatches; here"):
        admission().stamp(begin(microbatches, mode=mode, slice=slice_))


def test_a_round_of_another_history_is_refused() -> None:
    with pytest.raises(ManifestMismatch, match="do not share a history"):
        admission().stamp(begin(2, lineage=8))


@pytest.mark.parametrize(
    ("fields", "error"), [({"epoch": 2}, StaleEpoch), ({"receiver": 0}, BadFrame), ({}, ManifestMismatch)]
)
def test_what_is_not_for_this_stage_of_this_run(fields: dict[str, Any], error: type[Exception]) -> None:
    admission().check(header())
    with pytest.raises(error):
        admission().check(header(**fields) if fields else replace(header(), run=78))


@pytest.mark.parametrize("coefficient", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_decision_with_a_coefficient_that_no_clipping_gives(coefficient: float) -> None:
    sound = Frame(header(FrameKind.DECIDE), to_bytes(Decide(Outcome.COMMIT, 0.25)))
    assert admission().decision(sound).coefficient == 0.25
    with pytest.raises(BadFrame, match="wanted 0 to 1"):
        admission().decision(replace(sound, payload=to_bytes(Decide(Outcome.COMMIT, coefficient))))
