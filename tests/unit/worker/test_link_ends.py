"""One end of a link over the rounds of a batch: what it refers to, what a skipped tick, a probe or NaN leaves of that."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from codec.basis import Basis
from codec.errors import BasisMismatch, NonFiniteError, ReferenceMismatch
from codec.spec import Direction
from swarm_core.config import RunConfig
from swarm_core.knobs import DataSection, LinksSection, ModelSection
from swarm_core.learning.crossing import Crossing
from swarm_core.learning.objective import packet_seed
from swarm_core.learning.partition import Span
from swarm_core.manifest import Manifest
from swarm_core.wire.messages import Mode
from swarm_worker.link_ends import LinkEnd
from swarm_worker.schedule import COMPRESSED, DENSE, Stamp
from swarm_worker.sketching import Sketcher

WIDTH, RANK = 24, 8
FORWARD, BACKWARD = Direction.FORWARD, Direction.BACKWARD
CROSSING = Crossing(((1, 30), (2, 20), (4, 14)))
SCORE = Stamp(epoch=1, tick=4, mode=Mode.SCORE, batch=2)
TICKS = [Stamp(epoch=1, tick=4 + i, mode=Mode.TRAIN, batch=2, pass_=1 + i) for i in range(4)]
PROBE = Stamp(epoch=1, tick=4, mode=Mode.PROBE, batch=2, pass_=1)


def end(sketcher: Sketcher | None = None, **knobs: Any) -> LinkEnd:
    links = LinksSection(rank_forward=RANK, rank_backward=RANK, **({"zstd": "off", "outliers": 0.0} | knobs))
    config = RunConfig(model=ModelSection(path="m"), data=DataSection(train="t.jsonl"), links=links)
    spans = (Span(0, 2, 0, 1), Span(1, 2, 1, 2))
    q_HR = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=torch.Generator().manual_seed(1)))[0]
    bases = {0: {(0, d): Basis.orthonormal(0, q_HR.contiguous(), step=0.05) for d in Direction}}
    return LinkEnd(Manifest(config, spans, WIDTH, 40, ""), 0, bases, sketcher)


def rows(seed: int = 0, drift: float = 0.0) -> Tensor:
    """Rows as weights make them, that move a little with the weights."""
    generator = torch.Generator().manual_seed(seed)
    x_UH = torch.randn(CROSSING.rows, WIDTH, generator=generator)
    return x_UH + drift * torch.randn(CROSSING.rows, WIDTH, generator=generator)


def crossed(sender: LinkEnd, receiver: LinkEnd, stamp: Stamp, x_UH: Tensor, microbatch: int = 0) -> tuple[int, Tensor]:
    """(bytes, what arrived)."""
    packet = sender.encode(x_UH, FORWARD, stamp, CROSSING, microbatch).payload
    return len(packet), receiver.decode(packet, FORWARD, stamp, CROSSING, microbatch)


def settle(*ends: LinkEnd, keep: bool) -> None:
    for each in ends:
        each.settle(keep=keep)


def test_changes_are_cheap_and_exact_from_the_score_pass_on() -> None:
    sender, receiver, plain = end(), end(), end(reuse_deltas=False)
    whole, _ = crossed(sender, receiver, SCORE, rows())
    for i, stamp in enumerate(TICKS):
        x_UH = rows(drift=0.003 * (i + 1))
        size, got_UH = crossed(sender, receiver, stamp, x_UH)
        assert size < 0.6 * whole
        assert (got_UH - crossed(plain, plain, stamp, x_UH)[1]).abs().max() < 0.2
        settle(sender, receiver, keep=True)
    nothing, _ = crossed(sender, receiver, TICKS[3], x_UH)
    assert nothing < 100, "what has not changed costs a header"


def test_a_tick_that_is_not_committed_leaves_the_references_as_they_were() -> None:
    sender, receiver = end(), end()
    crossed(sender, receiver, SCORE, rows())
    before = crossed(sender, receiver, TICKS[0], rows(drift=0.003))
    held = sender.references()
    settle(sender, receiver, keep=False)
    assert {n: t.tolist() for n, t in sender.references().items()} == {n: t.tolist() for n, t in held.items()}
    crossed(sender, receiver, TICKS[0], rows(seed=9))  # something else altogether, skipped too
    settle(sender, receiver, keep=False)
    again = crossed(sender, receiver, TICKS[0], rows(drift=0.003))
    assert again[0] == before[0] and torch.equal(again[1], before[1])


def test_a_score_pass_outlives_an_empty_first_tick() -> None:
    sender, receiver = end(), end()
    crossed(sender, receiver, SCORE, rows())
    settle(sender, receiver, keep=False)  # the skip of a tick in which nothing crossed
    assert crossed(sender, receiver, TICKS[1], rows())[0] < 100


@pytest.mark.parametrize("settled", [False, True])
def test_a_checkpoint_goes_on_with_the_same_references(settled: bool) -> None:
    """Also one taken between the score pass and the first tick."""
    sender, receiver = end(), end()
    crossed(sender, receiver, SCORE, rows())
    if settled:
        crossed(sender, receiver, TICKS[0], rows(drift=0.003))
        settle(sender, receiver, keep=True)
    resumed = end(), end()
    for old, new in zip((sender, receiver), resumed, strict=True):
        assert old.references()
        new.load_references({name: tensor.clone() for name, tensor in old.references().items()})
    a, b = (crossed(*ends, TICKS[1], rows(drift=0.005)) for ends in ((sender, receiver), resumed))
    assert a[0] == b[0] and torch.equal(a[1], b[1])


def test_a_probe_leaves_no_trace() -> None:
    """Not in references, sketches, measures or what the link knows of zstd."""
    said = []
    for probed in (False, True):
        sketcher = Sketcher("weighted")
        sender, receiver = end(sketcher, zstd="auto"), end()
        crossed(sender, receiver, SCORE, rows())
        if probed:
            for _ in range(40):
                dense = crossed(sender, receiver, PROBE, rows(seed=3), DENSE)[1]
                assert torch.equal(dense, rows(seed=3))
                assert not torch.equal(crossed(sender, receiver, PROBE, rows(seed=3), COMPRESSED)[1], dense)
            grad = sender.encode(rows(seed=4), BACKWARD, PROBE, CROSSING, COMPRESSED)
            assert grad.dense_bytes == 0, "a dense run sends no probe"
        out = [crossed(sender, receiver, stamp, rows(drift=0.003 * i)) for i, stamp in enumerate(TICKS)]
        (sketch,) = sketcher.take()
        sums = sketch.trace, sketch.rows_seen, sketch.packet_bytes, sketch.v_HR.tolist()
        said.append((sums, sender.take_measures(), [(size, x.tolist()) for size, x in out]))
    assert said[0] == said[1]


def test_what_cannot_be_sent_stages_nothing() -> None:
    sender, receiver = end(), end()
    crossed(sender, receiver, SCORE, rows())
    size, _ = crossed(sender, receiver, TICKS[0], rows(drift=0.003))
    settle(sender, receiver, keep=False)
    bad_UH = rows()
    bad_UH[5, 2] = float("nan")
    assert sender.reuse is not None
    held = sender.reuse.held_bytes
    with pytest.raises(NonFiniteError, match="1 rows .first: row 5."):
        sender.encode(bad_UH, FORWARD, TICKS[0], CROSSING, 0)
    assert sender.reuse.held_bytes == held
    crossed(sender, receiver, TICKS[0], torch.zeros_like(bad_UH))  # what travels instead
    settle(sender, receiver, keep=False)
    assert crossed(sender, receiver, TICKS[1], rows(drift=0.003))[0] == size


def test_what_a_receiver_has_lost_comes_whole_and_is_the_same() -> None:
    sender, receiver, keeps = end(), end(), end()
    packet = sender.encode(rows(), FORWARD, SCORE, CROSSING, 0).payload
    for each in (receiver, keeps):
        each.decode(packet, FORWARD, SCORE, CROSSING, 0)
    receiver.forget()
    packet = sender.encode(rows(drift=0.003), FORWARD, TICKS[0], CROSSING, 0).payload
    wanted_UH = keeps.decode(packet, FORWARD, TICKS[0], CROSSING, 0)
    with pytest.raises(ReferenceMismatch):
        receiver.decode(packet, FORWARD, TICKS[0], CROSSING, 0)
    whole = sender.encode_whole(TICKS[0], CROSSING)
    assert whole.dense_bytes == 0 and len(whole.payload) > len(packet)
    assert torch.equal(receiver.decode(whole.payload, FORWARD, TICKS[0], CROSSING, 0), wanted_UH)
    settle(sender, receiver, keep=True)
    assert crossed(sender, receiver, TICKS[1], rows(drift=0.003))[0] < 100, "both hold the same again"


def test_a_reference_pass_refers_to_nothing() -> None:
    sender = end()
    first = sender.encode(rows(), FORWARD, SCORE, CROSSING, 0).payload
    reference = Stamp(epoch=1, tick=4, mode=Mode.REFERENCE, batch=2)
    assert sender.encode(rows(), FORWARD, reference, CROSSING, 0).payload == first
    assert len(sender.encode(rows(), FORWARD, TICKS[0], CROSSING, 0).payload) < 100


def test_a_version_that_is_not_held_is_named() -> None:
    with pytest.raises(BasisMismatch, match="version 7"):
        end().encode(rows(), FORWARD, Stamp(basis_version=7), CROSSING, 0)


def test_random_rounding_differs_by_place_and_not_by_process() -> None:
    sender = end(stochastic_rounding=True)

    def packet(stamp: Stamp, microbatch: int) -> bytes:
        return sender.encode(rows(), BACKWARD, stamp, CROSSING, microbatch).payload

    assert packet(TICKS[0], 0) == packet(TICKS[0], 0)
    assert len({packet(stamp, i) for stamp in TICKS for i in range(3)}) == 12
    code = "from swarm_core.learning.objective import packet_seed; print(packet_seed(0, 5, 0, 3, 1))"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(elsewhere) == packet_seed(0, 5, 0, 3, 1) == 1572594553054871954


@pytest.mark.parametrize("change", [lambda x: x * 0.0, lambda x: x])
def test_measures_are_means_over_rows_and_leave_out_what_has_no_energy(change: Callable[[Tensor], Tensor]) -> None:
    sender = end()
    sender.encode(change(rows()), FORWARD, TICKS[0], CROSSING, 0)
    measures = sender.take_measures()
    if change(1.0) == 0.0:
        assert measures == {}
    else:
        x_UH = rows()
        y_UH = x_UH @ sender._bases[0][(0, FORWARD)].encoder_HR
        share = (y_UH / x_UH.norm(dim=1, keepdim=True)).square().sum() / len(x_UH)
        assert measures["basis/share_forward/boundary_0"] == pytest.approx(float(share), rel=1e-4)
        assert 1 - share < measures["basis/error_forward/boundary_0"] < 1.01 - share
    assert sender.take_measures() == {}
