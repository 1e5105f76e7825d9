"""How the decoupling experiment is shown: the page in benchmarks/ and its tables. Trains nothing, draws nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import record
from experiments.codec.figures import Interval, signed
from experiments.decoupling.cells import CELLS, EVAL_EVERY
from experiments.decoupling.cells import Cell as Declared
from experiments.decoupling.figures import MARGIN, Cell, Pinning

DEFAULT_CADENCE = 60


def cells_table(cells: Sequence[Cell]) -> str:
    titles = (
        "cell", "seeds", "final accuracy", "less none, 95 %", f"non-inferior at {MARGIN}", "less dense, 95 %", "lowest",
        "mean over the run", "mean dose",
    )  # fmt: skip
    lines = []
    for c in cells:
        verdict = {None: "", True: "yes", False: "no"}[c.non_inferior]
        dose = f"{c.dose.mean:.4f}" if c.latency else ""
        lines.append([
            c.name, str(c.seeds), both(c.final), signed(c.less_none), verdict, signed(c.less_dense), both(c.lowest),
            both(c.mean), dose,
        ])  # fmt: skip
    return record.table(titles, lines)


def behaviour_table(cells: Sequence[Cell]) -> str:
    titles = (
        "cell", "length", "entropy", "clip fraction", "through the links", "K", "lambda", "c", "cos(C, G)",
        "cos of the form",
    )  # fmt: skip
    lines = []
    for c in cells:
        about = [""] * 5
        if c.latency:
            sized = [f"{c.lambda_:.2f}", f"{c.c:.2f}"] if c.lambda_ else ["", ""]
            about = [f"{c.latency:.1f}", *sized, f"{c.cos:+.3f}", f"{c.form_cosine:.2f}"]
        lines.append([c.name, both(c.length, 3), both(c.entropy, 3), both(c.clip, 4), both(c.links), *about])
    return record.table(titles, lines)


def effects_table(effects: Sequence[tuple[str, Interval, Interval]]) -> str:
    lines = [[name, signed(end), signed(over)] for name, end, over in effects]
    return record.table(("signed_ema, what was changed", "final accuracy", "mean over the run"), lines)


def pinning_table(cells: Sequence[Pinning]) -> str:
    titles = (
        "cell", "seeds", "refreshes", "overlap", "clip after a refresh", "others", "difference, 95 %", "largest after",
        "largest of the others", "final accuracy",
    )  # fmt: skip
    lines = [
        [
            c.name, str(c.seeds), str(c.refreshes), f"{c.overlap.mean:.2f}", both(c.after, 4), both(c.others, 4),
            signed(c.difference), f"{c.largest:.3f}", f"{c.others_largest:.3f}", both(c.final),
        ]
        for c in cells
    ]  # fmt: skip
    return record.table(titles, lines)


def sizes_table(found: Mapping[str, Any]) -> str:
    """Bytes of one snapshot or correction, in ticks of the fast path too, and a run's total with each form."""
    fast, size, kept = found["fast_per_tick"], found["bytes"], found["cosines"]

    def line(label: str, bytes_: float, *more: str) -> list[str]:
        return [label, f"{bytes_:,.0f}", f"{bytes_ / fast:.2f}", *more, *[""] * (5 - len(more))]

    lines = [line("fast path, a tick", fast), line("bases and sketches, a tick", found["bases_per_tick"])]
    for what in ("bf16", "tf32", "exact"):
        for span, label in (("whole", "whole"), ("20", "20 ticks apart"), ("60", "60 ticks apart")):
            lines.append(line(f"snapshot {what}, {label}", size[f"snapshot {what} {span}"]))
    lines.append(line("slice with its log-probs", found["slice"]))
    for form in ("sign", "lowrank", "topk", "bf16"):
        for what in ("M",) if form == "sign" else ("M", "delta"):  # a sign has no size to add
            name = f"{what} {form}"
            numbers = [f"{value:.2f}" for value in totals(found, size[name])]
            cadence = f"{doubling_cadence(found, size[name]):.0f}"
            lines.append(line(f"correction {form} of {what}", size[name], f"{kept[name]:.3f}", *numbers, cadence))
    titles = (
        "", "bytes", "in ticks of the fast path", "cos(decoded, exact)", f"total at cadence {DEFAULT_CADENCE}",
        "with bases and sketches", "and the first snapshot", "cadence at which the total is 2",
    )  # fmt: skip
    return record.table(titles, lines)


def totals(found: Mapping[str, Any], correction: float) -> tuple[float, float, float]:
    """As multiples of the fast path, at the default cadence and rounding: with snapshots and corrections; with bases and
    sketches, too; and with the first snapshot, which is whole, over the ticks that the example declares."""
    fast, size = found["fast_per_tick"], found["bytes"]
    own = 1 + _slow_bytes(found, correction) / DEFAULT_CADENCE / fast
    upkeep = own + found["bases_per_tick"] / fast
    first = (size["snapshot tf32 whole"] - size["snapshot tf32 60"]) / found["run_ticks"]
    return own, upkeep, upkeep + first / fast


def doubling_cadence(found: Mapping[str, Any], correction: float) -> float:
    """At which snapshots and corrections cost as much as the fast path, with a delta over 60 ticks."""
    return _slow_bytes(found, correction) / float(found["fast_per_tick"])


def _slow_bytes(found: Mapping[str, Any], correction: float) -> float:
    return float(found["bytes"]["snapshot tf32 60"] + found["slice"] + correction)


def page(
    cells: Sequence[Cell],
    effects: Sequence[tuple[str, Interval, Interval]],
    pinned: Sequence[Pinning],
    sizes: Mapping[str, Mapping[str, Any]],
    workload: str,
    facts: Mapping[str, Any],
) -> str:
    """The whole page."""
    weighed = "\n\n".join(_sizes(name, found) for name, found in sizes.items())
    settings = "\n".join(f"- `{name}`: {', '.join(_knobs(cell))}" for name, cell in CELLS.items())
    return f"""\
# Staleness: the anchor's corrections at delay_k and cadence of 5 and 20 ticks

Written by `python -m experiments.decoupling table --record`; the numbers behind it are in `decoupling.json`.
{facts["date"]}. {facts["cpu"]}, {facts["cores"]} cores, {facts["memory_gib"]} GiB, Linux {facts["kernel"]}, Python
{facts["python"]}, torch {facts["torch"]}.

{workload}

## Accuracy

{cells_table(cells)}

{effects_table(effects)}

![by tick](decoupling.png)

- *accuracy*: of the weights without links, which is what a run exports: the probability that sampling at temperature 1
  gives the right answer, exactly, mean over the validation problems, every {EVAL_EVERY} ticks. Intervals are means with
  95 % t-intervals over seeds; differences are paired by seed (same prompts, same sampling noise). *less none*: against the
  cell without a merger whose bases are refreshed as often. *non-inferior*: the interval's lower end is above -{MARGIN}.
- *cadence* is that of corrections and bases both, as in the record's fire block. A correction made from tick s is merged
  from tick s + delay_k exactly on, until the next one: with both at 20 its age is 20 to 39 ticks.
- *mean dose*: ||what was added|| / ||merged gradient||, mean over all ticks, 0 where nothing was merged. Read it beside
  the verdict: mu^20 is 0.08, so `held_delta` at K = 20 is harmless not least because it hardly acts; `no decay` acts.

## Behaviour

{behaviour_table(cells)}

Length (tokens, `<eos>` included), entropy (nats) and clip fraction: last quarter of the run. *through the links*: final
accuracy with every boundary's activations encoded. *K*: mean age of what was merged. *cos(C, G)*: of the correction with
the gradient that it was merged into; *of the form*: of what arrives with what was sent.

## Pinning

{pinning_table(pinned)}

![clip fraction](pinning.png)

A new basis is held by all stages one tick after its window ended, hence between the two ticks of a batch. Pinned, it waits
for the next batch; unpinned (`anchor.pin_basis = false`), the batch's second tick compares log-probs through two different
bases. *warm step*: the calibrator's own refresh. *large jump*: a basis fitted afresh on 8 prompts at the weights of the
moment. *overlap*: mean squared cosine of the principal angles between old and new. Second ticks only: in the first the
ratio is 1. The differences are within a run, their intervals over seeds.

## Bytes

{weighed}

*total*: fast path (activations and gradients), snapshots, slices and corrections, as multiples of the fast path; bases are
counted whole. Snapshots in the totals are those of `anchor.snapshot = auto` (TF32 here). A snapshot grows with the
parameters, the fast path with the tokens of a tick times the width: these models see very few tokens a tick.

## Cells

{settings}
"""


def _knobs(cell: Declared) -> list[str]:
    more = {"basis_lag": cell.basis_lag, "cold_prompts": cell.cold_prompts}
    return [f"`{k} = {v}`" for k, v in (cell.overrides | {k: str(v) for k, v in more.items() if v}).items()]


def _sizes(name: str, found: Mapping[str, Any]) -> str:
    return f"""\
### {name}

{found["parameters"]:,} parameters, {found["tokens_per_tick"]:,.0f} completion tokens a tick, lr {found["lr"]:g}: the example's own run
file; {found["snapshots"]} snapshots. Message bytes, sums over the stages.

{sizes_table(found)}"""


def both(found: Interval, digits: int = 3) -> str:
    half = "" if math.isinf(found.half) else f" ± {found.half:.{digits}f}"
    return f"{found.mean:.{digits}f}{half}"
