"""How the decoupling experiment is shown: the page in benchmarks/, all tables. Computes nothing but what a table says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.codec.figures import Interval
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
    return _table(titles, lines)


def behaviour_table(cells: Sequence[Cell]) -> str:
    titles = (
        "cell", "length", "entropy", "clip fraction", "through the links", "K", "lambda", "c", "cos(C, G)", "cos of the form",
    )  # fmt: skip
    lines = []
    for c in cells:
        about = [""] * 5
        if c.latency:
            sized = [f"{c.lambda_:.2f}", f"{c.c:.2f}"] if c.lambda_ else ["", ""]
            about = [f"{c.latency:.1f}", *sized, f"{c.cos:+.3f}", f"{c.form_cosine:.2f}"]
        lines.append([c.name, both(c.length, 3), both(c.entropy, 3), both(c.clip, 4), both(c.links), *about])
    return _table(titles, lines)


def effects_table(effects: Sequence[tuple[str, Interval, Interval]]) -> str:
    lines = [[name, signed(end), signed(over)] for name, end, over in effects]
    return _table(("signed_ema, what was changed", "final accuracy", "mean over the run"), lines)


def pinning_table(cells: Sequence[Pinning]) -> str:
    titles = (
        "cell", "seeds", "refreshes", "overlap", "clip after a refresh", "others", "difference, 95 %", "largest after",
        "largest of the others", "KL after", "KL of the others", "final accuracy",
    )  # fmt: skip
    lines = [
        [
            c.name, str(c.seeds), str(c.refreshes), f"{c.overlap.mean:.2f}", both(c.after, 4), both(c.others, 4),
            signed(c.difference), f"{c.largest:.3f}", f"{c.others_largest:.3f}", f"{c.kl_after.mean:.4f}",
            f"{c.kl_others.mean:.4f}", both(c.final),
        ]
        for c in cells
    ]  # fmt: skip
    return _table(titles, lines)


def sizes_table(found: Mapping[str, Any]) -> str:
    """Bytes of one snapshot or correction, as multiples of a tick's fast path too, and a run's total with each form."""
    fast, size, kept = found["fast_per_tick"], found["bytes"], found["cosines"]
    lines = [["fast path, a tick", _bytes(fast), "1.00", "", "", ""]]
    for what in ("bf16", "tf32", "exact"):
        for span in ("whole", "20", "60"):
            bytes_ = size[f"snapshot {what} {span}"]
            label = "whole" if span == "whole" else f"{span} ticks apart"
            lines.append([f"snapshot {what}, {label}", _bytes(bytes_), f"{bytes_ / fast:.2f}", "", "", ""])
    lines.append(["slice with its log-probs", _bytes(found["slice"]), f"{found['slice'] / fast:.2f}", "", "", ""])
    for form in ("sign", "lowrank", "topk", "bf16"):
        for what in ("M", "delta"):
            if (form, what) == ("sign", "delta"):
                continue  # a sign has no size to add
            bytes_ = size[f"{what} {form}"]
            total, with_first = (f"{value:.2f}" for value in totals(found, bytes_))
            label = f"correction {form} of {what}"
            lines.append(
                [label, _bytes(bytes_), f"{bytes_ / fast:.2f}", f"{kept[f'{what} {form}']:.3f}", total, with_first]
            )
    titles = (
        "", "bytes", "in ticks of the fast path", "cos(decoded, exact)", f"all bytes / fast path, cadence {DEFAULT_CADENCE}",
        "the first, whole snapshot included",
    )  # fmt: skip
    return _table(titles, lines)


def totals(found: Mapping[str, Any], correction: float) -> tuple[float, float]:
    """All bytes over the fast path's at the default cadence and rounding, bases included: on and on, and over the run that
    the example declares with its first snapshot, which is whole."""
    fast, size = found["fast_per_tick"], found["bytes"]
    slow = (size["snapshot tf32 60"] + found["slice"] + correction) / DEFAULT_CADENCE
    steady = (fast + found["bases_per_tick"] + slow) / fast
    first = (size["snapshot tf32 whole"] - size["snapshot tf32 60"]) / found["run_ticks"]
    return steady, steady + first / fast


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
    settings = "\n".join(
        f"- `{c.name}`: {', '.join(f'`{k} = {v}`' for k, v in c.overrides.items() if k.startswith(('links.k', 'anchor.', 'corr')))}"
        for c in cells
    )
    return f"""\
# Staleness: the anchor's corrections at delay_k and cadence of 5 and 20 ticks

Written by `python -m experiments.decoupling table --record`; the numbers behind it are in `decoupling.json`. {facts["date"]}.
{facts["cpu"]}, {facts["cores"]} cores, {facts["memory_gib"]} GiB, Linux {facts["kernel"]}, Python {facts["python"]}, torch {facts["torch"]}.

{workload}

## Accuracy

{cells_table(cells)}

{effects_table(effects)}

![by tick](decoupling.png)

- *accuracy*: of the weights without links, which is what a run exports: the probability that sampling at temperature 1 gives the
  right answer, exactly, mean over the validation problems, every 8 ticks. All intervals: mean and 95 % t-interval over seeds;
  differences are paired by seed (the same prompts, the same sampling noise). *less none*: against the cell without a merger
  whose bases are refreshed as often. *non-inferior*: the interval's lower end lies above -{MARGIN}.
- *cadence* is that of corrections and bases both, as in the record's fire block. A correction made from tick s is merged from
  tick s + delay_k exactly on, until the next one: at delay_k 20 and cadence 20 its age is 20 to 39 ticks.
- *mean dose*: ||what was added|| / ||merged gradient||, mean over all ticks, 0 where nothing was merged. Read it beside the
  verdict: mu^20 is 0.08, so `held_delta` at K = 20 is harmless partly because it hardly acts.

## Behaviour

{behaviour_table(cells)}

Length (tokens, `<eos>` included), entropy (nats) and clip fraction: last quarter of the run. *through the links*: final accuracy with
every boundary's activations encoded. *K*: mean age at which corrections were merged. *cos(C, G)*: of the correction with the
gradient that it was merged into; *of the form*: of what arrives with what was sent.

## Pinning

{pinning_table(pinned)}

![clip fraction](decoupling_pinning.png)

A new basis is held by all stages one tick after its window ended, hence between the two ticks of a batch. Pinned, it waits for the
next batch; unpinned (`anchor.pin_basis = false`), the batch's second tick compares log-probs through two different bases.
*warm step*: the calibrator's own refresh. *large jump*: a basis fitted afresh on 8 prompts at the weights of the moment.
*overlap*: mean squared cosine of the principal angles between old and new. Second ticks only: in the first the ratio is 1.

## Bytes

{weighed}

## Cells

{settings}
"""


def _sizes(name: str, found: Mapping[str, Any]) -> str:
    return f"""\
### {name}

{found["parameters"]:,} parameters, lr {found["lr"]:g}, the example's own run; {found["snapshots"]} snapshots. Message bytes, sums over the stages.

{sizes_table(found)}"""


def both(found: Interval, digits: int = 3) -> str:
    half = "" if math.isinf(found.half) else f" ± {found.half:.{digits}f}"
    return f"{found.mean:.{digits}f}{half}"


def signed(found: Interval | None) -> str:
    if found is None:
        return ""
    half = "" if math.isinf(found.half) else f" ± {found.half:.4f}"
    return f"{found.mean:+.4f}{half}"


def _bytes(number: float) -> str:
    return f"{number:,.0f}"


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["--:"] * (len(titles) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (titles, rule, *lines))
