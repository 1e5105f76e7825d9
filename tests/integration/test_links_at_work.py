"""Lossy links in a whole swarm: every quantiser and fit trains; a stop, a poisoned tensor or a refresh changes nothing else."""

from __future__ import annotations

import csv
import json
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from codec.basis import Basis
from codec.spec import Direction
from swarm_core.config import load
from swarm_core.learning.batch import Batch, make_batch
from swarm_core.learning.rollout import to_samples
from swarm_core.manifest import make_manifest
from swarm_core.models.architecture import fingerprint, read_shape
from swarm_core.wire.messages import Decide, Mode, Outcome
from swarm_worker.compute import Packet, StageCompute
from swarm_worker.lead import Lead
from swarm_worker.link_ends import LinkEnd
from swarm_worker.sampler.replay import read_rollouts
from swarm_worker.schedule import Stamp
from swarm_worker.shard import read_shard, shard_name

Recipe = Any
Swarm = Callable[..., str]
# The defaults but for their size: uniform quantiser, oblique bases, reuse deltas, prompts shared.
LINKS = {"kind": "lowrank", "rank_forward": 8, "rank_backward": 16, "zstd": "off"}  # whether it pays is measured anew
FIXED = {"q_cadence": 0, "calibration_prompts": 1}  # when a newer basis is adopted depends on the clock


def metrics(out: Path, type_: str = "tick") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if type_ in (row["type"], row.get("event"))]


def journal(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]


def shard(out: Path, tick: int, stage: int, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """Without what a stage has been handed of a batch that begins with this tick: it may be there already, or come next."""
    tensors = read_shard(out / "checkpoints" / f"tick-{tick:08d}" / shard_name(stage, 3)).tensors
    begun = (tick - 1) // 4  # four ticks a batch
    ahead = tuple(f"batch.{number}." for number in range(begun + 1, begun + 3))
    return {name: t for name, t in tensors.items() if name.startswith(prefixes) and not name.startswith(ahead)}


def sent(out: Path, since: int) -> dict[tuple[str, str, str], int]:
    """Packet bytes by tick, link and kind. Only from `since` on: a score pass before a stop is counted before it."""
    with (out / "ledger.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] in ("activation", "gradient")]
    return {(r["tick"], r["link"], r["kind"]): int(r["packet_bytes"]) for r in rows if int(r["tick"]) >= since}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


QUANTISERS = ["uniform", "int8", "int4", "bf16"]
FITS = ["metric", "weighted", "plain"]


@pytest.mark.parametrize("backward", ["straight_through", "exact"])
@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_every_quantiser_and_fit_trains_both_ways_back(
    quantiser: str, backward: str, recipe: Callable[..., Recipe], run_swarm: Swarm, tmp_path: Path
) -> None:
    fit = FITS[(QUANTISERS.index(quantiser) + (backward == "exact")) % 3]
    # A low bar for outliers, so that there are some; a rank that leaves something of an untrained model's rows.
    links = {"kind": "lowrank", "rank_forward": 20, "rank_backward": 20, "outliers": 1.2, "fit": fit}
    links |= {"backward": backward, "quantiser_forward": quantiser, "quantiser_backward": quantiser}
    out = tmp_path / "run"
    run_file = recipe("qwen3").run_file(
        run={"ticks": 4}, links=links, anchor={"q_cadence": 2, "calibration_prompts": 1}
    )
    run_swarm(run_file, out)
    rows = metrics(out)
    assert [row["outcome"] for row in rows] == ["commit"] * 4
    for boundary in (0, 1):
        for direction in ("forward", "backward"):
            error = rows[0][f"basis/error_{direction}/boundary_{boundary}"]
            oblique = fit == "metric" and (direction == "forward" or backward == "exact")
            assert 0.0 < error and (error < 1.0 or oblique), "only an oblique pair may add energy"
    assert metrics(out, "basis"), "no basis was refreshed"


def test_a_stop_between_the_score_pass_and_its_first_tick_keeps_the_references(
    recipe: Callable[..., Recipe], run_swarm: Swarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = recipe("llama").run_file(run={"ticks": 12}, links=LINKS, anchor=FIXED)
    run_swarm(run_file, tmp_path / "whole")
    next_round = Lead.next_round

    def stops(self: Lead, corrections: Any = None) -> Stamp | None:
        stamp = next_round(self, corrections)
        self.stop_requested |= stamp is not None and stamp.mode is Mode.SCORE and stamp.batch == 1
        return stamp

    out = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(Lead, "next_round", stops)
        assert run_swarm(run_file, out) == "stopped on request"
    held = {stage: shard(out, 4, stage, ("references.",)) for stage in range(3)}
    for stage, boundaries in ((0, (0,)), (1, (0, 1)), (2, (1,))):
        assert {int(name.split(".")[1]) for name in held[stage]} == set(boundaries)
    for boundary in (0, 1):
        assert_equal(
            *({n: t for n, t in held[boundary + i].items() if n.startswith(f"references.{boundary}.")} for i in (0, 1))
        )
    run_swarm(run_file, out, resume=True)
    assert journal(out) == journal(tmp_path / "whole")
    for stage in range(3):
        assert_equal(shard(out, 12, stage), shard(tmp_path / "whole", 12, stage))
    assert sent(out, 5) == sent(tmp_path / "whole", 5), "changes crossed where changes crossed before"


def test_resume_in_the_middle_of_a_batch_sends_the_same_changes(
    recipe: Callable[..., Recipe], run_swarm: Swarm, tmp_path: Path
) -> None:
    # Tick 6 lies between the two passes over batch 1, tick 7 in the middle of one.
    run_file = recipe("qwen2").run_file(
        run={"ticks": 12}, links=LINKS, anchor=FIXED, checkpoint={"every": 1, "keep": 99}
    )
    run_swarm(run_file, tmp_path / "whole")
    for at in (6, 7):
        out = tmp_path / f"parts-{at}"
        run_swarm(run_file, out, overrides={"run.ticks": str(at)})
        assert shard(out, at, 1, ("references.",)), "both passes over a batch are needed for this"
        run_swarm(run_file, out, resume=True)
        for tick in (at + 1, 12):
            for stage in range(3):
                assert_equal(shard(out, tick, stage), shard(tmp_path / "whole", tick, stage))
        assert journal(out) == journal(tmp_path / "whole")
        assert sent(out, at) == sent(tmp_path / "whole", at)


@pytest.mark.parametrize(("stage", "backward"), [(0, False), (1, False), (1, True)])
def test_a_poisoned_tensor_is_named_and_skips_its_tick_everywhere(
    stage: int,
    backward: bool,
    recipe: Callable[..., Recipe],
    run_swarm: Swarm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On the second pass over batch 0, where what crosses are changes."""
    encode, done = LinkEnd.encode, []

    def poisoned(
        self: LinkEnd, x: Tensor, direction: Direction, stamp: Stamp, crossing: Any, microbatch: int
    ) -> Packet:
        here = self.boundary == stage - backward and direction is Direction(backward)
        if here and stamp.mode is Mode.TRAIN and stamp.tick == 2 and microbatch == 0 and not done:
            done.append(None)
            x = x.detach().clone()
            x[len(x) // 2, 3] = float("inf")
        return encode(self, x, direction, stamp, crossing, microbatch)

    monkeypatch.setattr(LinkEnd, "encode", poisoned)
    out = tmp_path / "run"
    run_file = recipe("llama").run_file(
        run={"ticks": 8}, links=LINKS, anchor=FIXED, checkpoint={"every": 1, "keep": 99}
    )
    with caplog.at_level(logging.WARNING):
        run_swarm(run_file, out)
    lines = journal(out)
    assert [line["reason"] for line in lines] == ["", "", "nonfinite", *[""] * 5]
    assert [line["batch"] for line in lines] == [0, 0, 0, 1, 1, 1, 1, 2], "the batch ends with it"
    where = (
        f"stage {stage}, microbatch 0, tick 2 (train): lowrank {('forward', 'backward')[backward]} rows: got 1 values"
    )
    for told in (lines[2]["fault"], metrics(out)[2]["fault"], caplog.text):
        assert where in told
    for i in range(3):
        kept = ("model.", "lm_head.", "optimizer.")
        assert_equal(shard(out, 2, i, kept), shard(out, 3, i, kept))
        assert not shard(out, 3, i, ("references.",)), "nothing refers to a batch that is over"
        assert shard(out, 5, i, ("references.",))


def test_steering_changes_rank_and_step_with_a_batch_on_both_ends(
    recipe: Callable[..., Recipe], run_swarm: Swarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[int, int, Direction], set[tuple[int, int, float]]] = defaultdict(set)
    used = LinkEnd._basis

    def noting(self: LinkEnd, stamp: Stamp, direction: Direction) -> Basis | None:
        basis = used(self, stamp, direction)
        assert basis is not None
        seen[(stamp.batch, self.boundary, direction)].add((basis.version, basis.rank, basis.step))
        return basis

    monkeypatch.setattr(LinkEnd, "_basis", noting)
    out = tmp_path / "run"
    links = {"kind": "lowrank", "rank_forward": 16, "rank_backward": 16, "fit": "weighted"}
    links |= {"step_forward": 2.0, "step_backward": 2.0, "bytes_per_token": 1.0}
    run_file = recipe("llama", batches=8).run_file(
        run={"ticks": 24}, links=links, anchor={"q_cadence": 4, "calibration_prompts": 4}
    )
    run_swarm(run_file, out)
    told = [row["message"] for row in metrics(out, "steering")]
    assert any(m.startswith("boundary 0 forward: ") and "aim 1" in m and "rank 16 -> " in m for m in told), told
    assert all(len(bases) == 1 for bases in seen.values()), "a batch saw two bases"
    for boundary in (0, 1):
        shapes = {next(iter(bases)) for (_, b, d), bases in seen.items() if (b, d) == (boundary, Direction.FORWARD)}
        assert len({rank for _, rank, _ in shapes}) > 1 and len({step for _, _, step in shapes}) > 1, shapes
    last = metrics(out, "basis")[-1]
    assert last["basis/step_forward/boundary_0"] > 2.0 and last["basis/rank_forward/boundary_0"] < 16


def two_stages(
    recipe: Recipe, links: dict[str, Any], basis: Callable[[int], Basis]
) -> tuple[list[StageCompute], Batch]:
    """Two stages in this process, with a batch in microbatches of 6: groups of 4 completions, some cut in two."""
    run_file = recipe.run_file(swarm={"stages": 2}, grpo={"ticks_per_pass": 1}, links={"kind": "lowrank", **links})
    manifest = make_manifest(load(run_file), read_shape(recipe.model), fingerprint(recipe.model))
    stages = [StageCompute(manifest, i, recipe.model, torch.device("cpu")) for i in range(2)]
    samples, stats = to_samples(next(read_rollouts(recipe.record, 4)), stages[0].loss_spec)
    counts = [stats.denominators.tokens], [stats.denominators.sequences]
    batch = make_batch(0, 0, [samples], *counts, 6, keep_groups=True)
    for stage in stages:
        stage.add_batch(batch)
        stage.add_bases(0, {(0, d): basis(0) for d in Direction})
    return stages, batch


def payload(packet: Packet | None) -> bytes:
    assert packet is not None
    return packet.payload


def score(stages: list[StageCompute], stamp: Stamp) -> list[bytes]:
    """The activations that crossed."""
    packets = [payload(stages[0].score(stamp, i, None)) for i in range(stamp.microbatches)]
    for i, packet in enumerate(packets):
        stages[1].score(stamp, i, packet)
    return packets


def tick(stages: list[StageCompute], stamp: Stamp) -> list[bytes]:
    """The activations and gradients that crossed."""
    crossed = []
    for i in range(stamp.microbatches):
        crossed.append(payload(stages[0].forward(stamp, i, None)))
        crossed.append(payload(stages[1].loss(stamp, i, crossed[-1])))
        stages[0].backward(stamp, i, crossed[-1])
    return crossed


def test_a_tick_that_is_skipped_or_tried_again_leaves_everything_as_it_was(recipe: Callable[..., Recipe]) -> None:
    made = recipe("qwen3", batches=1)
    links = {"rank_forward": 16, "rank_backward": 16, "zstd": "off", "step_forward": 0.05}
    stages, batch = two_stages(made, links, lambda v: Basis.orthonormal(v, torch.eye(32)[:, :16].contiguous(), 0.05))
    train = Stamp(microbatches=batch.microbatches[0], pass_=1)
    whole = score(stages, replace(train, mode=Mode.SCORE, pass_=0))
    with torch.no_grad():  # as an earlier slice's tick would, so that what crosses differs from what is referred to
        for parameter in stages[0].parameters:
            parameter.mul_(1.002)
    before = [{name: t.clone() for name, t in stage.to_shard({}).tensors.items()} for stage in stages]
    assert any(name.startswith("references.") for name in before[0])
    first = tick(stages, train)
    for stage in stages:
        stage.tally(train)
        stage.apply(train, Decide(outcome=Outcome.SKIP, reason="gate"))
    for stage, was in zip(stages, before, strict=True):
        now = stage.to_shard({}).tensors
        kept = ("model.", "lm_head.", "optimizer.", "references.")
        assert_equal(*({n: t for n, t in tensors.items() if n.startswith(kept)} for tensors in (now, was)))
    assert tick(stages, replace(train, attempt=1)) == first
    for stage in stages:
        stage.tally(train)
        stage.apply(train, Decide(outcome=Outcome.COMMIT, coefficient=1.0))
    assert sum(map(len, first[::2])) < sum(map(len, whole)), "changes only"
    again = tick(stages, replace(train, tick=1, pass_=2))
    assert again != first and sum(map(len, again[::2])) < sum(map(len, whole)), "changes since the tick"


def gradients(recipe: Recipe, share: bool) -> list[Tensor]:
    """Of one scored tick, over a link of full rank and a step near nothing."""
    links = {"rank_forward": 32, "rank_backward": 32, "share_prompts": share, "outliers": 0.0, "gradient_scale": "row"}
    stages, batch = two_stages(recipe, links, lambda v: Basis.orthonormal(v, torch.eye(32), step=5e-4))
    train = Stamp(microbatches=batch.microbatches[0], pass_=1)
    score(stages, replace(train, mode=Mode.SCORE, pass_=0))
    tick(stages, train)
    crossed = sum(batch.crossing(0, i, share=share).rows for i in range(train.microbatches))
    assert (crossed < sum(batch.layout(0, i).tokens for i in range(train.microbatches))) == share
    return [p.grad for stage in stages for p in stage.parameters if p.grad is not None]


def test_sharing_prompts_gives_the_same_gradient(recipe: Callable[..., Recipe]) -> None:
    made = recipe("llama", batches=1)
    apart, together = gradients(made, share=False), gradients(made, share=True)
    assert len(apart) == len(together) > 20
    for a, b in zip(apart, together, strict=True):
        assert float((a - b).norm()) <= 2e-3 * float(a.norm())


def test_fp64_runs_on_exact_links(recipe: Callable[..., Recipe], run_swarm: Swarm, tmp_path: Path) -> None:
    run_file = recipe("llama").run_file(run={"ticks": 4})
    run_swarm(run_file, tmp_path / "fp64", overrides={"run.precision": "fp64"})
    run_swarm(run_file, tmp_path / "fp32", overrides={"run.precision": "fp32"})
    wide, narrow = ([row["grad_norm"] for row in metrics(tmp_path / name)] for name in ("fp64", "fp32"))
    assert wide != narrow and wide == pytest.approx(narrow, rel=1e-3)
    assert {t.dtype for t in shard(tmp_path / "fp64", 4, 1, ("model.",)).values()} == {torch.float64}
