"""Corrections in a whole swarm: what the anchor replays is what the swarm did; what is bad is refused, and ticks go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anchor_node.corrector import Corrector
from anchor_node.dense_replay import DenseReplay
from swarm_core.errors import UserError
from swarm_core.wire.messages import Correction
from swarm_worker.compute import StageCompute
from swarm_worker.correcting import Correcting
from swarm_worker.lead import Lead
from swarm_worker.schedule import Stamp

Recipe = Any
Swarm = Callable[..., str]
ANCHOR = {"m_cadence": 3, "q_cadence": 0, "calibration_prompts": 1, "snapshot": "exact"}


def rows(out: Path, type_: str = "tick") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if type_ in (row["type"], row.get("event"))]


def test_over_identity_links_m_is_the_swarms_own_gradient(
    recipe: Recipe, run_swarm: Swarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several ticks, mid-batch and reuse ones among them; the corrections merged in between do not matter to it."""
    own: dict[tuple[int, int], list[Tensor]] = {}
    again: dict[tuple[int, int], list[Tensor]] = {}
    merge, run = Correcting.merge, DenseReplay.run

    def keep(self: Correcting, stamp: Stamp) -> dict[str, float]:
        own[(stamp.tick, self._span.stage)] = [p.grad.clone() for p in self._parameters if p.grad is not None]
        return merge(self, stamp)

    def seen(self: DenseReplay, *args: Any, **named: Any) -> Any:
        made = run(self, *args, **named)
        again.update({(named["tick"], i): [t.clone() for t in g] for i, g in enumerate(made.gradients)})
        return made

    monkeypatch.setattr(Correcting, "merge", keep)
    monkeypatch.setattr(DenseReplay, "run", seen)
    monkeypatch.setattr(StageCompute, "tally", _merging_always(StageCompute.tally))
    monkeypatch.setattr(Lead, "_newest", lambda self, held: max(self.state.corrections, default=0))
    file = recipe(batches=8).run_file(
        run={"ticks": 24}, anchor=ANCHOR, corrections={"merger": "signed_ema", "k_max": 1000}
    )
    run_swarm(file, tmp_path / "run")
    ticks = {tick for tick, _ in again}
    assert len(ticks) >= 3, "too few replays to say anything"
    for key, gradients in again.items():
        assert len(gradients) == len(own[key])
        for m, g in zip(gradients, own[key], strict=True):
            assert torch.equal(m, g), key  # the issue wants 1e-6; on a CPU it is to the bit


def _merging_always(tally: Callable[..., Any]) -> Callable[..., Any]:
    """A tick without a correction goes through `merge` too, so that its gradient can be looked at there."""

    def tallied(self: StageCompute, stamp: Stamp) -> Any:
        if not stamp.correction and self.correcting is not None and stamp.microbatches:
            self.correcting.merge(stamp)
        return tally(self, stamp)

    return tallied


@pytest.mark.parametrize(
    ("corrections", "links"),
    [
        ({"merger": "held_delta"}, {"kind": "lowrank", "rank_forward": 8, "rank_backward": 16}),
        ({"merger": "held_delta", "form": "topk", "age_from": "birth"}, {"kind": "none"}),
        ({"merger": "held_delta", "form": "bf16"}, {"kind": "lowrank", "rank_forward": 8, "backward": "exact"}),
        ({"merger": "signed_ema", "beta_anc": 0.5}, {"kind": "lowrank", "rank_forward": 8, "rank_backward": 16}),
    ],
)
def test_corrections_are_merged_by_all_stages_and_measured(
    corrections: dict[str, Any], links: dict[str, Any], recipe: Recipe, run_swarm: Swarm, tmp_path: Path
) -> None:
    file = recipe(batches=10).run_file(
        run={"ticks": 36}, anchor={**ANCHOR, "snapshot": "auto"}, corrections=corrections, links=links
    )
    out = tmp_path / "run"
    assert run_swarm(file, out) == "all 36 ticks are done"
    merged = [row for row in rows(out) if "correction/version" in row]
    made = {row["correction/made"]: row for row in rows(out, "correction")}
    assert merged and made
    versions = [row["correction/version"] for row in merged]
    assert versions == sorted(versions)
    for row in merged:
        assert row["correction/K"] == row["tick"] - made[row["correction/version"]]["correction/snapshot_tick"] >= 1
        assert row["tick"] >= made[row["correction/version"]]["correction/not_before"]
        assert -1 <= row["correction/cos"] <= 1 and row["correction/share"] >= 0
        assert ("correction/lambda" in row) == (corrections["merger"] == "held_delta")
        if corrections["merger"] == "held_delta":
            assert 0 <= row["correction/lambda"] <= 0.5
    assert {line["correction"] for line in _journal(out)} >= set(versions)
    assert not rows(out, "correction_refused") and not rows(out, "snapshot_refused") and not rows(out, "replay_failed")


def test_a_run_that_is_stopped_and_continued_goes_on_with_its_corrections(
    recipe: Recipe, run_swarm: Swarm, tmp_path: Path
) -> None:
    """The checkpoint lies within the life of a correction and within a batch; the next snapshots are new ones."""
    links = {"kind": "lowrank", "rank_forward": 8, "rank_backward": 16}
    anchor = {**ANCHOR, "snapshot": "auto", "latency": "fixed", "delay_k": 5, "m_cadence": 2}  # several are pending
    file = recipe(batches=10).run_file(anchor=anchor, corrections={"merger": "held_delta"}, links=links)
    out = tmp_path / "run"
    run_swarm(file, out, overrides={"run.ticks": "18"})
    assert run_swarm(file, out, overrides={"run.ticks": "36"}, resume=True) == "all 36 ticks are done"
    merged = {row["tick"]: row for row in rows(out) if "correction/version" in row}
    assert min(merged) < 18 <= max(merged)
    for tick, row in merged.items():
        assert row["correction/K"] >= 5 and row["correction/version"] >= merged.get(tick - 1, row)["correction/version"]
    for what in ("correction_refused", "snapshot_refused", "replay_failed", "corrections_failed"):
        assert not rows(out, what), rows(out, what)
    made = [row["correction/made"] for row in rows(out, "correction")]
    assert len(made) == len(set(made)), "none is made twice"


def test_what_is_wrong_is_refused_with_its_reason_and_ticks_go_on(
    recipe: Recipe, run_swarm: Swarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Corrector._deliver
    wrong: list[Callable[[Correction], Correction]] = [
        lambda c: replace(c, packet=c.packet[:-1]),
        lambda c: replace(c, version=c.version + 1),
        lambda c: replace(c, lineage=c.lineage ^ 1),
        lambda c: replace(c, digest=b"x" * 16),
    ]

    def deliver(self: Corrector, made: Any) -> None:
        change = wrong[(made.version - 1) % len(wrong)]
        send(self, replace(made, corrections={**made.corrections, 1: change(made.corrections[1])}))

    monkeypatch.setattr(Corrector, "_deliver", deliver)
    file = recipe(batches=10).run_file(run={"ticks": 32}, anchor=ANCHOR, corrections={"merger": "signed_ema"})
    out = tmp_path / "run"
    assert run_swarm(file, out) == "all 32 ticks are done"
    refused = [row["message"] for row in rows(out, "correction_refused")]
    assert len(refused) >= 2 and all(text.startswith("stage 1: correction") for text in refused)
    assert not [row for row in rows(out) if "correction/version" in row], "what one stage refused, none may merge"


def test_a_ring_too_small_is_refused_at_the_start_with_the_number_needed(
    recipe: Recipe, run_swarm: Swarm, tmp_path: Path
) -> None:
    file = recipe().run_file(
        anchor={"ring_mb": 40, "m_cadence": 5, "latency": "fixed", "delay_k": 20}, corrections={"merger": "signed_ema"}
    )
    with pytest.raises(BaseException) as error:
        run_swarm(file, tmp_path / "run")
    found = error.value.exceptions[0] if isinstance(error.value, BaseExceptionGroup) else error.value
    assert isinstance(found, UserError) and "anchor.ring_mb" in str(found) and "MiB (6 pairs" in str(found)


def _journal(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
