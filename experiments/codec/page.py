"""How the cells are shown: the page and the plot in benchmarks/. Computes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import record
from experiments.codec.figures import MARGIN, Cell, Interval, signed

LOWEST = -0.032  # of the plot: what lost more stands at its foot, so that the others can be told apart

TITLES = (
    "", "cell", "seeds", "bytes/token down", "up", "% of dense", "of it basis, sketch", "accuracy", "less dense, 95 %",
    f"non-inferior at {MARGIN}", "through the links", "less dense, 95 %", "KL start", "KL end", "worst dlogp",
    "cos start", "cos end",
)  # fmt: skip


def table(cells: Sequence[Cell]) -> str:
    """A markdown table, a line a cell."""
    return record.table(TITLES, [[str(number), *_line(c)] for number, c in enumerate(cells)], left=(1,))


def _line(c: Cell) -> list[str]:
    verdict = {None: "", True: "yes", False: "no"}[c.non_inferior]
    return [
        c.name,
        str(c.seeds),
        f"{c.forward_bytes:.1f}",
        f"{c.backward_bytes:.1f}",
        f"{c.share_of_dense:.2%}",
        f"{c.overhead_share:.0%}",
        _accuracy(c.weights),
        signed(c.weights_less_dense),
        verdict,
        _accuracy(c.links),
        signed(c.links_less_dense),
        f"{c.start_kl:.1e}",
        f"{c.end_kl:.1e}",
        f"{c.end_logp_shift:.2f}",
        f"{c.start_cosine:.3f}",
        f"{c.end_cosine:.3f}",
    ]


def _accuracy(found: Interval) -> str:
    return f"{found.mean:.4f}"


def page(models: Mapping[str, Sequence[Cell]], workloads: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    """The whole page."""
    sections = "\n".join(
        f"## {name}\n\n{workloads[name]}\n\n{table(cells)}\n" for name, cells in models.items() if cells
    )
    settings = "\n".join(
        f"- `{name}`, `{c.name}`: {', '.join(f'`{k} = {v}`' for k, v in c.overrides.items() if _of_the_cell(k))}"
        for name, cells in models.items()
        for c in cells
    )
    return f"""\
# Training over compressed links

Written by `python -m experiments.codec table`; the numbers behind it are in `codec.json`. {facts["date"]}.
{facts["cpu"]}, {facts["cores"]} cores, {facts["memory_gib"]} GiB, Linux {facts["kernel"]}, Python {facts["python"]}, torch {facts["torch"]}.

{sections}
![accuracy against bytes](codec.png)

- Each run is the swarm's own code in one thread: stages, packets, lead, gate, sampler and basis calibration; three stages,
  two boundaries. The weights are those of `swarm_worker local`, bit for bit, where no clock is involved
  (`tests/integration/test_codec_table_smoke.py`). Seed s of a cell and seed s of dense draw the same prompts with the same noise.
- *bytes/token*: message bytes (packet, framing) of activations (down) and gradients (up) for each row and boundary, score passes
  included. *% of dense*: message bytes of activations, gradients, bases (every copy, version 0 too) and sketches over 2 H bytes for
  each activation and gradient row. Dense links stay below 100 % because zstd finds rows that are bit for bit the same: the
  completions of a group share their prompt, and right ones are the same tokens.
- *accuracy*: of the trained weights without links, which is what a run exports: the probability that sampling at temperature 1
  gives the right answer, exactly, mean over held-out problems. *through the links*: the same with every boundary's
  activations encoded and decoded. *less dense*: paired by seed, mean and 95 % t-interval, both against dense accuracy.
  *non-inferior*: the interval's lower end lies above -{MARGIN}.
- *KL*, *worst dlogp*: compressed links against none at the same weights, next-token distributions at 64 x 8 sampled completions;
  *cos*: of a tick's gradient against the one without compression, the worst stage's.

## Cells

{settings}
"""


def _of_the_cell(key: str) -> bool:
    return key.startswith(("links.", "anchor."))


def plot(models: Mapping[str, Sequence[Cell]], file: Path) -> None:
    """Accuracy less dense against % of dense bytes, both kinds of accuracy, one panel a model; numbers as in the table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {name: cells for name, cells in models.items() if cells}
    figure, axes = plt.subplots(1, len(shown), figsize=(6.4 * len(shown), 4.6), squeeze=False, layout="constrained")
    for axis, (name, cells) in zip(axes[0], shown.items(), strict=True):
        kinds = ("weights", "o", "trained weights"), ("links", "x", "the same through the links")
        for what, marker, label in kinds:
            points = [(n, c, d) for n, c in enumerate(cells) if (d := getattr(c, f"{what}_less_dense")) is not None]
            x, y = [100 * c.share_of_dense for _, c, _ in points], [max(d.mean, LOWEST) for *_, d in points]
            half = [0.0 if math.isinf(d.half) or d.mean < LOWEST else d.half for *_, d in points]
            bars = axis.errorbar(x, y, yerr=half, fmt=marker, capsize=2, linewidth=1, label=label)
            for (number, _, found), *point in zip(points, x, y, strict=True):
                text = str(number) if found.mean >= LOWEST else f"{number}: {found.mean:+.2f}"
                side = (3, 4) if what == "weights" else (3, -10 - 9 * (found.mean < LOWEST) * (number % 2))
                axis.annotate(
                    text, point, xytext=side, textcoords="offset points", fontsize=7, color=bars[0].get_color()
                )
        axis.axhline(-MARGIN, linestyle=":", color="grey", linewidth=1)
        axis.axvline(3.0, linestyle=":", color="grey", linewidth=1)
        axis.set_xscale("log")
        axis.set_ylim(LOWEST - 0.003, 0.008)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.tick_params(which="minor", labelsize=7)
        axis.set(title=name, xlabel="bytes on the links, % of dense bf16", ylabel="accuracy less dense")
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)
