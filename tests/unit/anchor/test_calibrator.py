"""The bases: version 0 is what plain torch finds, and a later one is made of all sketches of a window or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from anchor_node.calibrator import BasisKeeper, calibration_samples, directions, first_bases, part_for_stage
from anchor_node.steering import Decision, Window
from codec.basis import Basis
from codec.fit import FitName, fit_pair, orthonormalise, overlap
from codec.spec import Direction, LinkSpec
from swarm_core.learning.microbatch import Sample
from swarm_core.learning.partition import Span
from swarm_core.models.reading import open_stage
from swarm_core.wire.bases import Key, basis_of, matrix_of
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import BasisSet, Sketch, from_bytes, to_bytes

TINY = Path(__file__).parents[3] / "examples" / "tiny" / "model"
F, B = Direction.FORWARD, Direction.BACKWARD
SPEC = LinkSpec("lowrank", 8, 2, 3)
ALL = [(boundary, direction) for boundary in (0, 1) for direction in (F, B)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def samples(count: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(3)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(1, 15, (length,), generator=generator).tolist()

    prompts, answers = [ids(3, 9) for _ in range(count)], [ids(1, 5) for _ in range(count)]
    return calibration_samples(prompts, answers, generator)


def plain_moments(made: list[Sample], ends: list[int], weighted: bool) -> dict[Key, Tensor]:
    """Second moments of h and dL/dh at the end of each layer in `ends`: the whole model, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    held: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            held[layer] = output[0] if isinstance(output, tuple) else output
            held[layer].retain_grad()

        return hook

    for layer in ends:
        model.model.layers[layer].register_forward_hook(keep(layer))
    moments: dict[Key, Tensor] = {}
    for sample in made:
        ids = torch.cat((sample.prompt_ids, sample.completion_ids))[None]
        logp = model(ids).logits.log_softmax(-1)[0, len(sample.prompt_ids) - 1 : -1]
        chosen = logp.gather(1, sample.completion_ids[:, None]).sum()
        (-sample.advantage * chosen).backward()
        for boundary, layer in enumerate(ends):
            h, g = held[layer].detach()[0].double(), held[layer].grad
            assert g is not None
            g = g[0].double()
            weight_h = 1 / h.square().mean(1, keepdim=True) if weighted else 1.0
            weight_g = 1 / g.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30) if weighted else 1.0
            for direction, moment in ((F, (weight_h * h).T @ h), (B, (weight_g * g).T @ g)):
                key = (boundary, direction)
                moments[key] = moments[key] + moment if key in moments else moment
    return moments


def read(bases: BasisSet, spec: LinkSpec) -> dict[Key, Basis]:
    return {(m.boundary, Direction(m.direction)): basis_of(m, bases.version, spec) for m in bases.matrices}


SPANS = [Span(0, 3, 0, 2), Span(1, 3, 2, 4), Span(2, 3, 4, 6)]


@pytest.mark.parametrize("fit", ["plain", "weighted"])
def test_version_0_is_what_plain_torch_finds(fit: FitName) -> None:
    stages = [open_stage(TINY, span) for span in SPANS]
    made = samples(11)  # two microbatches, the second one not full
    width = stages[0].config.hidden_size
    spec = LinkSpec("lowrank", width, 12, 7)
    sent = first_bases(stages, made, spec, fit, steps=(0.5, 0.25))
    assert (sent.version, sent.tick) == (0, 0) and all(m.decoder == b"" for m in sent.matrices)
    bases = read(sent, spec)
    moments = plain_moments(made, [1, 3], fit == "weighted")
    assert set(bases) == set(moments)
    for key, moment in moments.items():
        rank = 12 if key[1] is F else 7
        assert bases[key].step == (0.5 if key[1] is F else 0.25)
        q_HR = torch.linalg.qr(bases[key].encoder_HR.double())[0]
        assert q_HR.shape == (width, rank)
        values, vectors = torch.linalg.eigh(moment)
        captured, best = torch.trace(q_HR.T @ moment @ q_HR), values[-rank:].sum()
        assert captured / best == pytest.approx(1.0, abs=1e-3), key  # the columns travel in bf16
        assert best < 0.999 * values.sum()  # or any basis would do
        leading = vectors[:, -3:]  # columns come in the order of their eigenvalues
        assert float(overlap(leading, bases[key].encoder_HR[:, :3])) > 0.99
    assert all(parameter.grad is None for stage in stages for parameter in stage.parameters())


@torch.no_grad()
def lost_nats(stages: list[Any], made: list[Sample], bases: dict[Key, Basis]) -> float:
    """Mean KL of the model from the one whose activations pass through the bases, at the answers' positions."""
    total, count = 0.0, 0
    for sample in made:
        logs = []
        for compressed in (False, True):
            h = torch.cat((sample.prompt_ids, sample.completion_ids))[None]
            for i, stage in enumerate(stages):
                h = stage(h)
                if compressed and i < 2:
                    h = h @ bases[(i, F)].encoder_HR @ bases[(i, F)].decoder_RH
            answers = h[0, len(sample.prompt_ids) - 1 : -1]
            logs.append((answers @ stages[-1].lm_head_weight.T).log_softmax(-1))
        total += float((logs[0].exp() * (logs[0] - logs[1])).sum())
        count += len(sample.completion_ids)
    return total / count


def sums(first: int, count: int) -> list[Sample]:
    rows = [json.loads(line) for line in (TINY.parent / "data/train.jsonl").read_text().splitlines()]
    rows = rows[first : first + count]
    ids = {c: i for i, c in enumerate("0123456789+-*= ", start=3)}
    prompts = [[ids[c] for c in row["prompt"]] for row in rows]
    answers = [[ids[c] for c in row["answer"]] + [1] for row in rows]
    return calibration_samples(prompts, answers, torch.Generator().manual_seed(0))


def test_a_metric_keeps_what_the_stages_behind_look_at() -> None:
    stages = [open_stage(TINY, span) for span in SPANS]
    spec = LinkSpec("lowrank", 96, 16, 4)
    lost = {}
    for fit in ("plain", "weighted", "metric"):
        sent = first_bases(stages, sums(0, 40), spec, fit)
        assert all(bool(m.decoder) == (fit == "metric" and m.direction == F) for m in sent.matrices)
        lost[fit] = lost_nats(stages, sums(500, 20), read(sent, spec))
    assert lost["metric"] < 0.6 * lost["weighted"] and lost["weighted"] < lost["plain"]
    assert to_bytes(sent) == to_bytes(first_bases(stages, sums(0, 40), spec, "metric"))  # labels are seeded


def test_exact_links_and_a_single_stage_have_fewer_bases() -> None:
    spans = [Span(0, 2, 0, 3), Span(1, 2, 3, 6)]
    stages = [open_stage(TINY, span) for span in spans]
    width = stages[0].config.hidden_size
    exact = LinkSpec("lowrank", width, 4, 4, backward="exact")
    assert set(read(first_bases(stages, samples(3), exact), exact)) == {(0, F)}
    assert first_bases([open_stage(TINY, Span(0, 1, 0, 6))], samples(3), exact).matrices == []
    assert directions(LinkSpec("none", 8)) == [] and directions(SPEC) == [F, B]


def test_calibration_samples_have_both_signs_and_depend_on_the_generator_alone() -> None:
    def signs(seed: int) -> list[float]:
        generator = torch.Generator().manual_seed(seed)
        return [s.advantage for s in calibration_samples([[1]] * 40, [[2]] * 40, generator)]

    assert set(signs(0)) == {1.0, -1.0} and 8 < signs(0).count(1.0) < 32
    assert signs(0) == signs(0) != signs(1)


def test_a_basis_set_comes_back_and_a_stage_gets_its_two_boundaries() -> None:
    keys = [(b, d) for b in range(3) for d in (F, B)]
    sent = BasisSet(6, 40, [matrix_of(key, torch.randn(8, 2), torch.randn(2, 8), 0.5) for key in keys])
    sent = from_bytes(BasisSet, to_bytes(sent))
    for stage, near in enumerate([{0}, {0, 1}, {1, 2}, {2}]):
        part = part_for_stage(sent, stage)
        assert {m.boundary for m in part.matrices} == near and (part.version, part.tick) == (6, 40)


# The keeper ---------------------------------------------------------------------------------------------------------


def start(spec: LinkSpec = SPEC, fit: FitName = "plain", **options: Any) -> BasisKeeper:
    keys = [key for key in ALL if key[1] in directions(spec)]
    matrices = [matrix_of(key, torch.eye(8)[:, : 2 if key[1] is F else 3], step=0.5) for key in keys]
    return BasisKeeper(spec, 2, BasisSet(0, 0, matrices), fit, **options)


def v(seed: int, key: Key, columns: int | None = None) -> Tensor:
    columns = columns or (2 if key[1] is F else 3)
    return torch.randn(8, columns, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def sketch(key: Key, v_HR: Tensor, tick: int = 9, version: int = 0, part: int = 0) -> Sketch:
    return Sketch(version, tick, matrix_of(key, v_HR), part, 100.0, 50, 200)


def same(basis: Basis, q_HR: Tensor) -> bool:
    return torch.equal(basis.encoder_HR, q_HR.to(torch.bfloat16).float())


def test_the_next_version_comes_with_the_last_sketch_of_a_window() -> None:
    keeper = start()
    old, first = dict(keeper.bases), keeper.current
    for i, key in enumerate(ALL[:-1]):
        assert keeper.add(sketch(key, v(i, key))) is None
        assert keeper.version == 0 and keeper.current is first
    made = keeper.add(sketch(ALL[-1], v(3, ALL[-1])))
    assert made is not None and (made.version, made.tick, keeper.version) == (1, 9, 1)
    for i, key in enumerate(ALL):
        basis = keeper.bases[key]
        assert same(basis, orthonormalise(v(i, key))) and (basis.version, basis.step) == (1, 0.5)
        assert keeper.overlap[key] == pytest.approx(float(overlap(old[key].encoder_HR, basis.encoder_HR)))
    assert keeper.current is made
    received = read(from_bytes(BasisSet, to_bytes(made)), SPEC)
    assert {k: b.digest() for k, b in received.items()} == {k: b.digest() for k, b in keeper.bases.items()}
    assert BasisKeeper(SPEC, 2, made).bases[ALL[0]].digest() == keeper.bases[ALL[0]].digest()  # resumed


@pytest.mark.parametrize("last", range(4))
def test_in_any_order(last: int) -> None:
    keeper = start()
    order = [*ALL[:last], *ALL[last + 1 :], ALL[last]]
    assert [keeper.add(sketch(key, v(0, key))) is not None for key in order] == [False, False, False, True]


def test_sketches_of_replicas_add_up() -> None:
    keeper = start()
    for key in ALL[:-1]:
        keeper.add(sketch(key, v(1, key)))
        keeper.add(sketch(key, v(2, key)), replica=1)
        keeper.add(sketch(key, v(2, key)), replica=1)  # the same once more
    keeper.add(sketch(ALL[-1], v(1, ALL[-1])))
    for key in ALL[:-1]:
        assert same(keeper.bases[key], orthonormalise(v(1, key).float() + v(2, key).float()))


def test_with_exact_links_the_backward_direction_is_not_waited_for_and_not_taken() -> None:
    keeper = start(LinkSpec("lowrank", 8, 2, backward="exact"))
    assert keeper.add(sketch((0, F), v(0, (0, F)))) is None
    with pytest.raises(BadFrame, match="was not asked for"):
        keeper.add(sketch((0, B), v(0, (0, B))))
    assert keeper.add(sketch((1, F), v(0, (1, F)))) is not None


def test_windows_do_not_mix_and_a_complete_one_ends_the_older_ones() -> None:
    keeper = start()
    for key in ALL[:3]:
        assert keeper.add(sketch(key, v(0, key), tick=9)) is None
    for key in ALL[:3]:
        assert keeper.add(sketch(key, v(1, key), tick=19)) is None
    made = keeper.add(sketch(ALL[3], v(1, ALL[3]), tick=19))
    assert made is not None and same(keeper.bases[ALL[0]], orthonormalise(v(1, ALL[0])))
    assert keeper.add(sketch(ALL[3], v(0, ALL[3]), tick=9)) is None  # what is missing of tick 9 comes too late
    assert keeper.version == 1


def test_absurd_ticks_push_out_nothing_of_others() -> None:
    keeper = start()
    for key in ALL[1:]:
        assert keeper.add(sketch(key, v(1, key), tick=19)) is None
    for tick in range(2**32 - 9, 2**32):
        assert keeper.add(sketch(ALL[0], v(0, ALL[0]), tick=tick)) is None
    assert keeper.add(sketch(ALL[0], v(1, ALL[0]), tick=19)) is None, "its own it has pushed out"
    for key in ALL[1:]:
        keeper.add(sketch(key, v(2, key), tick=2**32 - 1))
    assert keeper.version == 1, "and whoever goes along with it gets what it asks for"


def test_a_window_that_is_done_is_not_made_again_of_the_same_sketches() -> None:
    keeper = start()
    for _ in range(3):
        for key in ALL:
            keeper.add(sketch(key, v(1, key)))
    assert keeper.version == 1


def test_a_batch_that_is_still_on_an_older_version_refreshes_it_and_one_long_gone_is_dropped() -> None:
    keeper = start()
    for version in range(5):
        for key in ALL:
            keeper.add(sketch(key, v(version, key), tick=version, version=max(0, version - 1)))
        assert keeper.version == version + 1
    assert [keeper.add(sketch(key, v(0, key), tick=20)) for key in ALL] == [None] * 4
    assert keeper.version == 5


@pytest.mark.parametrize(
    "change",
    [
        {"boundary": 2},
        {"boundary": 2**32 - 1},
        {"direction": 2},
        {"direction": 1},  # the forward shape under the backward direction
        {"rows": 7},
        {"columns": 3},
        {"columns": 0},
        {"values": b""},
        {"values": bytes(2 * 8 * 2 - 1)},
        {"values": bytes(2 * 8 * 2 + 2)},
        {"decoder": bytes(2 * 8 * 2)},
        {"rows": 2**32 - 1, "columns": 2**32 - 1},
    ],
)
def test_a_sketch_of_the_wrong_shape_or_place_is_refused_and_leaves_nothing(change: dict[str, Any]) -> None:
    keeper = start()
    good = sketch((0, F), v(0, (0, F)))
    for bad in (replace(good, matrix=replace(good.matrix, **change)), replace(good, part=1), replace(good, part=7)):
        with pytest.raises(BadFrame) as caught:
            keeper.add(bad)
        assert "\n" not in str(caught.value)
    assert [keeper.add(sketch(key, v(0, key))) is not None for key in ALL] == [False, False, False, True]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_where_a_sketch_is_no_number_the_old_basis_stays_and_the_next_window_works(value: float) -> None:
    keeper = start()
    old = dict(keeper.bases)
    poisoned = v(0, ALL[2])
    poisoned[3, 1] = value
    for key in ALL:
        made = keeper.add(sketch(key, poisoned if key == ALL[2] else v(0, key), tick=9))
    assert made is not None and made.version == 1
    assert torch.equal(keeper.bases[ALL[2]].encoder_HR, old[ALL[2]].encoder_HR)
    assert same(keeper.bases[ALL[1]], orthonormalise(v(0, ALL[1])))
    for key in ALL:  # nothing in any of them: no new version
        assert keeper.add(sketch(key, v(0, key) * value, tick=19, version=1)) is None
    assert keeper.version == 1
    assert [keeper.add(sketch(k, v(1, k), tick=29, version=1)) is not None for k in ALL] == [False] * 3 + [True]


def test_a_metric_window_waits_for_both_ends_and_finds_the_best_pair() -> None:
    keeper = start(fit="metric", ridge=0.05)
    frames = [torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(s)))[0] for s in (1, 2)]
    c_HH, g_HH = ((q * d ** torch.arange(8)) @ q.T for q, d in zip(frames, (0.5, 0.6), strict=True))
    traces = float(c_HH.trace()), float(g_HH.trace())
    for version in range(8):
        parts = []
        for key in ALL:
            basis = keeper.bases[key]
            parts.append(replace(sketch(key, c_HH @ basis.encoder_HR, version, version), trace=traces[0]))
            if key[1] is F:
                there = sketch(key, g_HH @ basis.decoder_RH.T, version, version, part=1)
                parts.append(replace(there, trace=traces[1]))
        made = [keeper.add(part) for part in parts]
        assert [m is not None for m in made] == [False] * 5 + [True]
    best = fit_pair(c_HH, g_HH, 2, 0.05)
    wanted_HH = best.encoder_HR @ best.decoder_RH
    for boundary in (0, 1):
        basis = keeper.bases[(boundary, F)]
        assert (basis.encoder_HR @ basis.decoder_RH - wanted_HH).norm() < 0.03 * wanted_HH.norm()
        assert keeper.share[(boundary, F)] == pytest.approx(float(best.eigenvalues_R.sum()) / best.total, abs=0.05)
        assert keeper.overlap[(boundary, F)] > 0.999


class Steered:
    """A steering that notes what it sees and wants one thing."""

    def __init__(self, rank: int, step: float) -> None:
        self.wanted = Decision(rank, step, "test")
        self.seen: list[Window] = []

    def decide(self, window: Window) -> Decision:
        self.seen.append(window)
        return self.wanted


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_steering_sets_rank_and_step_of_the_next_version(rank: int) -> None:
    spec, steered = replace(SPEC, rank_forward=4), Steered(rank, 0.125)
    keeper: BasisKeeper = start(spec, steering={F: steered})
    for key in ALL:
        keeper.add(sketch(key, v(0, key)))
    assert len(steered.seen) == 2
    assert (steered.seen[0].bytes_per_token, steered.seen[0].step, steered.seen[0].rank) == (4.0, 0.5, 2)
    for key in ALL:
        basis = keeper.bases[key]
        assert (basis.rank, basis.step) == ((rank, 0.125) if key[1] is F else (3, 0.5))
    assert keeper.decisions[(0, F)] is steered.wanted
    for key in ALL:
        made = keeper.add(sketch(key, v(1, key, keeper.bases[key].rank), tick=19, version=1))
    assert made is not None and keeper.bases[(0, F)].rank == rank
