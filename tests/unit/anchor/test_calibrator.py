"""The bases: version 0 is what plain torch finds, and a later one is made of all sketches of a window or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from anchor_node.calibrator import (
    BasisKeeper,
    Key,
    basis_set,
    calibration_samples,
    directions,
    first_bases,
    part_for_stage,
)
from codec.basis import orthonormalise, overlap
from codec.spec import Direction, LinkSpec
from swarm_core.learning.microbatch import Sample
from swarm_core.learning.partition import Span
from swarm_core.models.reading import open_stage
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import BasisMatrix, BasisSet, Sketch, from_bytes, to_bytes

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


def plain_moments(made: list[Sample], ends: list[int]) -> dict[Key, Tensor]:
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
            weighted = h / h.square().mean(1, keepdim=True)
            for direction, moment in ((F, weighted.T @ h), (B, g[0].double().T @ g[0].double())):
                key = (boundary, direction)
                moments[key] = moments[key] + moment if key in moments else moment
    return moments


def test_version_0_is_what_plain_torch_finds() -> None:
    spans = [Span(0, 3, 0, 2), Span(1, 3, 2, 4), Span(2, 3, 4, 6)]
    stages = [open_stage(TINY, span) for span in spans]
    made = samples(11)  # two microbatches, the second one not full
    width = stages[0].config.hidden_size
    spec = LinkSpec("lowrank", width, 12, 7)
    bases = first_bases(stages, made, spec)
    moments = plain_moments(made, [1, 3])
    assert set(bases) == set(moments)
    for key, moment in moments.items():
        rank = 12 if key[1] is F else 7
        q_HR = bases[key].double()
        assert q_HR.shape == (width, rank) and bases[key].dtype == torch.float32
        assert torch.allclose(q_HR.T @ q_HR, torch.eye(rank, dtype=torch.float64), atol=1e-5)
        values, vectors = torch.linalg.eigh(moment)
        captured, best = torch.trace(q_HR.T @ moment @ q_HR), values[-rank:].sum()
        assert captured / best == pytest.approx(1.0, abs=1e-4), key
        assert best < 0.999999 * values.sum()  # or any basis would do
        leading = vectors[:, -3:]  # columns come in the order of their eigenvalues
        assert float(overlap(leading, q_HR[:, :3])) > 0.999
    assert all(parameter.grad is None for stage in stages for parameter in stage.parameters())


def test_exact_links_and_a_single_stage_have_fewer_bases() -> None:
    spans = [Span(0, 2, 0, 3), Span(1, 2, 3, 6)]
    stages = [open_stage(TINY, span) for span in spans]
    width = stages[0].config.hidden_size
    exact = LinkSpec("lowrank", width, 4, 4, backward="exact")
    assert set(first_bases(stages, samples(3), exact)) == {(0, F)}
    assert first_bases([open_stage(TINY, Span(0, 1, 0, 6))], samples(3), exact) == {}
    assert directions(LinkSpec("none", 8)) == [] and directions(SPEC) == [F, B]


def test_calibration_samples_have_both_signs_and_depend_on_the_generator_alone() -> None:
    def signs(seed: int) -> list[float]:
        generator = torch.Generator().manual_seed(seed)
        return [s.advantage for s in calibration_samples([[1]] * 40, [[2]] * 40, generator)]

    assert set(signs(0)) == {1.0, -1.0} and 8 < signs(0).count(1.0) < 32
    assert signs(0) == signs(0) != signs(1)


def test_a_basis_set_comes_back_and_a_stage_gets_its_two_boundaries() -> None:
    bases = {key: orthonormalise(torch.randn(8, 2)) for key in [(b, d) for b in range(3) for d in (F, B)]}
    sent = from_bytes(BasisSet, to_bytes(basis_set(6, 40, bases)))
    assert (sent.version, sent.tick, len(sent.matrices)) == (6, 40, 6)
    for matrix in sent.matrices:
        q_HR = torch.frombuffer(bytearray(matrix.values), dtype=torch.float32).view(matrix.rows, matrix.columns)
        assert torch.equal(q_HR, bases[(matrix.boundary, Direction(matrix.direction))])
    for stage, near in enumerate([{0}, {0, 1}, {1, 2}, {2}]):
        part = part_for_stage(sent, stage)
        assert {m.boundary for m in part.matrices} == near and (part.version, part.tick) == (6, 40)


# The keeper ---------------------------------------------------------------------------------------------------------


def start(spec: LinkSpec = SPEC) -> BasisKeeper:
    bases = {key: torch.eye(8)[:, : 2 if key[1] is F else 3] for key in ALL if key[1] in directions(spec)}
    return BasisKeeper(spec, 2, 0, bases)


def v(seed: int, key: Key) -> Tensor:
    return torch.randn(8, 2 if key[1] is F else 3, generator=torch.Generator().manual_seed(seed))


def sketch(key: Key, v_HR: Tensor, tick: int = 9) -> Sketch:
    matrix = BasisMatrix(key[0], int(key[1]), *v_HR.shape, v_HR.contiguous().numpy().tobytes())
    return Sketch(0, tick, matrix)


def test_the_next_version_comes_with_the_last_sketch_of_a_window() -> None:
    keeper = start()
    old = dict(keeper.bases)
    for i, key in enumerate(ALL[:-1]):
        assert keeper.add(sketch(key, v(i, key))) is None
        assert keeper.version == 0 and all(keeper.bases[k] is old[k] for k in ALL)
    made = keeper.add(sketch(ALL[-1], v(3, ALL[-1])))
    assert made is not None and (made.version, made.tick, keeper.version) == (1, 9, 1)
    for i, key in enumerate(ALL):
        assert torch.equal(keeper.bases[key], orthonormalise(v(i, key)))
        assert keeper.overlap[key] == pytest.approx(float(overlap(old[key], keeper.bases[key])))
    assert to_bytes(made) == to_bytes(basis_set(1, 9, keeper.bases))


@pytest.mark.parametrize("last", range(4))
def test_in_any_order(last: int) -> None:
    keeper = start()
    order = [*ALL[:last], *ALL[last + 1 :], ALL[last]]
    assert [keeper.add(sketch(key, v(0, key))) is not None for key in order] == [False, False, False, True]


def test_sketches_of_replicas_add_up() -> None:
    keeper = start()
    for key in ALL[:-1]:
        keeper.add(sketch(key, v(1, key)))
        keeper.add(sketch(key, v(2, key)))
    keeper.add(sketch(ALL[-1], v(1, ALL[-1])))
    for key in ALL[:-1]:
        assert torch.equal(keeper.bases[key], orthonormalise(v(1, key) + v(2, key)))


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
    assert made is not None and torch.equal(keeper.bases[ALL[0]], orthonormalise(v(1, ALL[0])))
    assert keeper.add(sketch(ALL[3], v(0, ALL[3]), tick=9)) is None  # what is missing of tick 9 comes too late
    assert keeper.version == 1


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
        {"values": bytes(4 * 8 * 2 - 1)},
        {"values": bytes(4 * 8 * 2 + 4)},
        {"rows": 2**32 - 1, "columns": 2**32 - 1},
    ],
)
def test_a_sketch_of_the_wrong_shape_or_place_is_refused_and_leaves_nothing(change: dict[str, Any]) -> None:
    keeper = start()
    good = sketch((0, F), v(0, (0, F)))
    with pytest.raises(BadFrame) as caught:
        keeper.add(replace(good, matrix=replace(good.matrix, **change)))
    assert "\n" not in str(caught.value)
    assert [keeper.add(sketch(key, v(0, key))) is not None for key in ALL] == [False, False, False, True]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sketch_that_is_no_number_keeps_the_old_bases_and_the_next_window_works(value: float) -> None:
    keeper = start()
    old = dict(keeper.bases)
    poisoned = v(0, ALL[2])
    poisoned[3, 1] = value
    for key in ALL:
        assert keeper.add(sketch(key, poisoned if key == ALL[2] else v(0, key), tick=9)) is None
    assert keeper.version == 0 and keeper.overlap == {} and all(torch.equal(keeper.bases[k], old[k]) for k in ALL)
    assert [keeper.add(sketch(key, v(1, key), tick=19)) is not None for key in ALL] == [False, False, False, True]
    assert keeper.version == 1
