"""What must be so when a simulated run has ended: every tick once, and the weights of a run that nothing has disturbed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bad_day import VOCAB, Plan
from pretend import Judge, PretendCompute, World, undisturbed

from anchor_node.checkpoints import found
from swarm_core.wire.messages import Decide
from swarm_core.wire.rollouts import read_rollouts, rollouts_message
from swarm_worker.stage_zero import batch_of


def check_end(plan: Plan, judge: Judge, out: Path, host: Path, *, stage_0_died: bool) -> None:
    """All ticks, once each, in journal (of stage 0's `host`) and books. Raises Objection."""
    assert judge.published is not None
    version, lines = judge.published, []
    while version[0] > 0:
        lines.append(judge.decisions[version])
        version = judge.parents[version]
    lines.reverse()
    journal = [json.loads(line) for line in (host / "journal.jsonl").read_text().splitlines()]
    told = [(s.tick, s.epoch, f"{s.lineage:016x}", d.coefficient.hex()) for s, d in lines]
    if told != [(row["tick"], row["epoch"], row["lineage"], row["coefficient"]) for row in journal]:
        judge.object("the journal is not what was decided")
    books = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = sorted(row["tick"] for row in books if row["type"] == "tick")
    # A report that nobody has heard dies with stage 0, unless the log still has it: it goes back two checkpoints.
    if rows != list(range(plan.ticks)) and (len(set(rows)) < len(rows) or plan.every == 0 or not stage_0_died):
        judge.object(f"the books have ticks {rows}")
    if not found(out) or found(out)[-1].tick != plan.ticks:
        judge.object("the last checkpoint is not complete")
    _check_weights(plan, judge, lines)


def _check_weights(plan: Plan, judge: Judge, lines: list[tuple[Any, Decide]]) -> None:
    manifest, calm = plan.manifest(), Judge(plan.seed, parents=judge.parents)
    stages = [PretendCompute(manifest, i, calm, World(plan.seed, plan.stages)) for i in range(plan.stages)]

    def begin(number: int, basis: int) -> None:
        rollouts = read_rollouts(rollouts_message(plan.rollouts(number)), VOCAB)
        batch = batch_of(rollouts, manifest.config, stages[0].loss_spec)[0]
        for stage in stages:
            stage.add_batch(batch)
            stage.add_bases(basis, f"basis {basis}")

    undisturbed(stages, lines, begin)
    for stage in stages:
        got = judge.weights.get((stage.span.stage, stage.history))
        if got != stage.weights:
            judge.object(f"stage {stage.span.stage} ends with {got}, undisturbed it has {stage.weights}")
