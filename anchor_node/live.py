"""The table a person watches while a run goes, fed with the rows that go to `metrics.jsonl`. Shows; decides nothing.

On a terminal it is redrawn in place; anywhere else (a pipe, CI, a log file) it is one plain line a tick. Whatever it is
fed, it never raises: a display must not end a training run.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.highlighter import NullHighlighter
from rich.live import Live
from rich.logging import RichHandler
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from anchor_node.correction_sums import REFUSALS, made_text, merge_text
from anchor_node.record import (
    KIND_ORDER,
    LINK_KINDS,
    UPKEEP,
    ByteCount,
    LedgerSummary,
    byte_text,
    number,
    share_text,
    upkeep_text,
    whole,
)

log = logging.getLogger(__name__)

#: Cumulative bytes by kind: a `LedgerSummary`, or kind -> `ByteCount`, or kind -> (dense, packet, message).
Totals = LedgerSummary | Mapping[str, "ByteCount | Sequence[int]"]
#: Bytes of activations and gradients by tick: (dense, packet), or (dense, packet, message).
ByTick = Mapping[int, Sequence[int]]

# Columns in reading order: name, least width, and importance: on a narrow terminal the highest numbers are left out.
COLUMNS = (
    ("tick", 5, 0), ("batch/pass", 10, 7), ("reward", 6, 1), ("valid", 6, 4), ("entropy", 7, 9), ("clip", 6, 10),
    ("dgg z", 6, 5), ("outcome", 9, 2), ("link/tick", 9, 3), ("of dense", 8, 6), ("tok/s", 7, 11), ("s/tick", 6, 8),
)  # fmt: skip
GAP = 2
#: How often the table is redrawn: often enough for a clock, rare enough to cost nothing.
REDRAW_HZ = 2


class LiveTable:
    """The last ticks of a run, with a header; use as a context manager, or call `start` and `stop`.

    `stages` is a number, `links` one line about the codec ("2 links, rank 24/48 of 896"), `target_ticks` 0 or None when
    the run is open-ended, `first_tick` the tick at which this process began (after a resume), `merger` the knob of that
    name: with one, two lines tell the correction in use and the anchor's state. Thread-safe.
    """

    def __init__(
        self,
        run: str,
        *,
        stages: int = 0,
        links: str = "",
        target_ticks: int | None = None,
        first_tick: int = 0,
        merger: str = "none",
        rows: int = 12,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console if console is not None else Console()
        self.plain = not self.console.is_terminal or self.console.is_dumb_terminal
        self._run, self._stages, self._links, self._target = run, stages, links, target_ticks or 0
        self._clock, self._started = clock, clock()
        self._lock = threading.RLock()
        self._ticks: deque[dict[str, Any]] = deque(maxlen=max(1, rows))
        self._evals: dict[int, dict[str, Any]] = {}
        self._sizes: dict[int, Sequence[int]] = {}
        self._link, self._summed_by_caller = (0, 0), False
        self._by_kind: dict[str, int] = {}
        self._done = first_tick
        self._counts = {"commit": 0, "skip": 0}
        self._last_eval = self._last_event = self._last_error = self._last_fault = self._last_probe = ""
        self._merger, self._merged_now, self._last_merge, self._made = merger, False, "", ""
        self._refused, self._waited_s = 0, 0.0
        self._live: Live | None = None
        self._stderr_logs: list[tuple[logging.Handler, logging.Handler]] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to draw; without a terminal there is nothing to begin."""
        self._started = self._clock()
        if self.plain or self._live is not None:
            return
        try:
            self._live = Live(get_renderable=self.render, console=self.console, refresh_per_second=REDRAW_HZ)
            self._live.start()
            self._logs_above()
        except Exception:
            log.warning("the live table cannot be drawn; going on with one line a tick", exc_info=True)
            self._live, self.plain = None, True

    def stop(self) -> None:
        """Draw once more and leave the table standing; further updates are kept but not drawn."""
        live, self._live = self._live, None
        for plain, above in self._stderr_logs:
            logging.getLogger().removeHandler(above)
            logging.getLogger().addHandler(plain)
        self._stderr_logs.clear()
        if live is not None:
            try:
                live.stop()
            except Exception:
                log.warning("the live table could not be closed", exc_info=True)

    def _logs_above(self) -> None:
        """Lines logged to the terminal go above the table while it is drawn; written past it they would tear it."""
        root = logging.getLogger()
        plain_ones = [handler for handler in root.handlers if type(handler) is logging.StreamHandler]
        for plain in [handler for handler in plain_ones if handler.stream.isatty()]:
            above = RichHandler(console=self.console, show_time=False, show_level=False, show_path=False, markup=False)
            above.highlighter = NullHighlighter()
            above.setFormatter(plain.formatter)
            root.removeHandler(plain)
            root.addHandler(above)
            self._stderr_logs.append((plain, above))

    def update(self, row: Mapping[str, Any]) -> None:
        """Take one metrics row of type tick, eval or event; a row that makes no sense is logged at debug level.

        A tick row may bring `bytes/links_previous_tick` and `bytes/share_of_dense`: a tick's last ledger rows arrive
        after its metrics. They stand in for `bytes_update` where nobody calls it.
        """
        try:
            with self._lock:
                line = self._take(dict(row))
            if line and self.plain:
                self.console.file.write(line + "\n")
                self.console.file.flush()
        except Exception:
            log.debug("row not shown: %r", row, exc_info=True)

    def bytes_update(self, totals: Totals, by_tick: ByTick | None = None) -> None:
        """Take the cumulative bytes by kind, and the links' bytes of single ticks; before `update` of a tick, so that
        its plain line has them. The share is that of messages, or of packets where messages are not told."""
        try:
            counts = totals.by_kind if isinstance(totals, LedgerSummary) else totals
            sums = [_sizes(counts[kind]) for kind in LINK_KINDS if kind in counts]
            sizes = {int(tick): (int(of[0]), int(of[-1])) for tick, of in (by_tick or {}).items() if len(of) > 1}
            with self._lock:
                self._link = (sum(dense for dense, _ in sums), sum(sent for _, sent in sums))
                self._by_kind = {kind: _sizes(counts[kind])[1] for kind in KIND_ORDER if kind in counts}
                self._summed_by_caller = True
                shown = {row["tick"] for row in self._ticks}
                newest = max(shown, default=-1)
                # Only what is or may yet be shown is kept: the caller's table may grow for weeks.
                self._sizes.update({tick: of for tick, of in sizes.items() if tick in shown or tick > newest})
        except Exception:
            log.debug("byte totals not shown: %r", totals, exc_info=True)

    def render(self) -> RenderableType:
        """The whole display, as rich draws it."""
        try:
            with self._lock:
                return Group(*self._header(), self._table(), Text(), self._footer())
        except Exception as error:
            log.debug("table not drawn", exc_info=True)
            return Text(f"table not drawn: {type(error).__name__}")

    # ---- taking rows -------------------------------------------------------------------------------------------------

    def _take(self, row: dict[str, Any]) -> str:
        """Remember a row; returns its plain line."""
        kind, tick = row.get("type"), whole(row.get("tick"))
        if kind == "event":
            name, message = _printable(row.get("event") or "event"), _printable(row.get("message") or "")
            text = f"{'' if tick is None else f'tick {tick}: '}{name}{': ' + message if message else ''}"
            self._made = (made_text(row) if name == "correction" else "") or self._made
            self._refused += name in REFUSALS
            if any(word in name for word in ("error", "dropped", "fail", "refused")):
                self._last_error = text
            else:
                self._last_event = text
            return f"event {text}"
        if tick is None:
            return ""
        if kind == "eval":
            self._evals = {old: of for old, of in self._evals.items() if old > tick - 1000}
            self._evals[tick] = row
            self._last_eval = f"{_score(row)} at tick {tick}"
            squeezed = number(row.get("eval/accuracy_compressed"))
            self._last_eval += f" ({100 * squeezed:.1f} % through compressed links)" if squeezed is not None else ""
            return f"validation {self._last_eval}"
        if kind != "tick":
            return ""
        row["tick"] = tick
        before, share = number(row.get("bytes/links_previous_tick")), number(row.get("bytes/share_of_dense"))
        if before and share and tick - 1 not in self._sizes:
            self._sizes[tick - 1] = (round(before / share), round(before))
            if not self._summed_by_caller:
                self._link = (self._link[0] + round(before / share), self._link[1] + round(before))
        kept = [old for old in self._ticks if old["tick"] != tick]
        self._ticks = deque(sorted([*kept, row], key=lambda one: int(one["tick"])), maxlen=self._ticks.maxlen)
        self._sizes = {old: of for old, of in self._sizes.items() if old >= self._ticks[0]["tick"] - 1}
        self._done = max(self._done, tick + 1)
        self._counts["skip" if row.get("outcome") == "skip" else "commit"] += 1
        if row.get("fault"):
            self._last_fault = _printable(row["fault"])  # it names its tick
        if probe := _probe(row):
            self._last_probe = f"{probe} at tick {tick}"
        merge = merge_text(row)
        self._merged_now, self._last_merge = bool(merge), f"{merge}, at tick {tick}" if merge else self._last_merge
        self._waited_s += number(row.get("anchor/wait_s")) or 0.0
        return self._plain_line(row)

    def _plain_line(self, row: dict[str, Any]) -> str:
        cells = self._cells(row)
        of_all = f" ({row['tick'] + 1}/{self._target})" if self._target else ""
        parts = [f"tick {cells['tick']}{of_all}"]
        parts += [f"{name} {cells[name]}" for name, _, _ in COLUMNS[1:] if cells[name] != "–" or name == "reward"]
        dense, sent = self._sizes.get(row["tick"] - 1, (0, 0))
        if row["tick"] not in self._sizes and dense:
            parts.append(f"links of tick {row['tick'] - 1}: {byte_text(sent)}, {share_text(sent / dense)} of dense")
        if probe := _probe(row):
            parts.append(f"fidelity {probe}")
        if merge := merge_text(row):
            parts.append(f"correction {merge}")
        if row.get("fault"):
            parts.append(f"fault: {_printable(row['fault'])}")
        return "  ".join(parts)

    # ---- drawing -----------------------------------------------------------------------------------------------------

    def _cells(self, row: dict[str, Any]) -> dict[str, str]:
        def shown(key: str, form: str) -> str:
            value = number(row.get(key))
            return "–" if value is None else format(value, form)

        dense, sent = self._sizes.get(row["tick"], (0, 0))
        clip = number(row.get("clip_ratio/region_mean"))
        evaluated = self._evals.get(row["tick"])
        outcome = _printable(row.get("outcome") or "–")
        if outcome == "skip":
            outcome = _printable(row.get("skip_reason") or "skip")
        return {
            "tick": str(row["tick"]),
            "batch/pass": f"{shown('batch', '.0f')}/{shown('pass', '.0f')}",
            "reward": shown("reward", ".3f"),
            "valid": "–" if evaluated is None else _score(evaluated, interval=False),
            "entropy": shown("entropy", ".3f"),
            "clip": "–" if clip is None else f"{100 * clip:.1f} %",
            "dgg z": shown("dgg/z", "+.2f"),
            "outcome": outcome,
            "link/tick": byte_text(sent) if sent else "–",
            "of dense": share_text(sent / dense if dense else None),
            "tok/s": shown("tokens_per_s", ",.0f"),
            "s/tick": shown("tick_s", ".2f"),
        }

    def _header(self) -> list[RenderableType]:
        elapsed = self._clock() - self._started
        facts = [f"{self._stages} stages"] if self._stages else []
        facts += [self._links] if self._links else []
        parts = [(self._run, "bold"), *((f"  ·  {fact}", "dim") for fact in [*facts, _clock_text(elapsed)])]
        title = Text.assemble(*parts, no_wrap=True, overflow="ellipsis")
        skipped = f", {self._counts['skip']} skipped" if self._counts["skip"] else ""
        if not self._target:
            return [title, Text(f"{self._done} ticks{skipped}"), Text()]
        speeds = [speed for row in self._ticks if (speed := number(row.get("tick_s"))) is not None]
        left = max(0, self._target - self._done) * sum(speeds) / len(speeds) if speeds else None
        words = Text(f"  {self._done} of {self._target} ticks{skipped}", no_wrap=True, overflow="ellipsis")
        words.append(f"  about {_clock_text(left)} to go" if left else "", "dim")
        line = Table.grid()
        width = max(8, min(40, self.console.width - len(words) - 1))
        line.add_row(ProgressBar(total=self._target, completed=min(self._done, self._target), width=width), words)
        return [title, line, Text()]

    def _table(self) -> Table:
        lines = [(row, self._cells(row)) for row in self._ticks]
        widths = {name: max(least, *(len(cells[name]) for _, cells in lines), 0) for name, least, _ in COLUMNS}
        chosen: set[str] = set()
        room = self.console.width
        for name, _, _ in sorted(COLUMNS, key=lambda column: column[2]):
            room -= widths[name] + (GAP if chosen else 0)
            if room < 0 and chosen:
                break
            chosen.add(name)
        columns = [name for name, _, _ in COLUMNS if name in chosen]
        table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="dim")
        for name in columns:
            justify: JustifyMethod = "left" if name == "outcome" else "right"
            table.add_column(name, justify=justify, no_wrap=True, min_width=min(widths[name], self.console.width))
        for row, cells in lines:
            style = "yellow" if row.get("outcome") == "skip" else None
            table.add_row(*(Text(cells[name]) for name in columns), style=style)
        return table

    def _footer(self) -> Table:
        dense, sent = self._link
        lines = [
            ("fidelity", self._last_probe, ""),
            *self._correction_lines(),
            ("validation", self._last_eval, ""),
            ("event", self._last_event, "dim"),
            ("skipped", self._last_fault, "yellow"),
            ("error", self._last_error, "red"),
        ]
        if dense:
            kinds = ", ".join(f"{kind} {byte_text(of)}" for kind, of in self._by_kind.items() if kind not in LINK_KINDS)
            lines.insert(0, ("other bytes", kinds, "dim"))
            upkeep = sum(self._by_kind.get(kind, 0) for kind in UPKEEP)
            full = f", {share_text((sent + upkeep) / dense)} with {upkeep_text(self._by_kind)}" if upkeep else ""
            lines.insert(0, ("links", f"{byte_text(sent)} sent, {share_text(sent / dense)} of dense{full}", ""))
        if not self._ticks:
            lines.insert(0, ("waiting", "for the first tick", "dim"))
        grid = Table.grid(padding=(0, GAP, 0, 0))
        grid.add_column(no_wrap=True, min_width=len("other bytes"))
        grid.add_column(no_wrap=True, overflow="ellipsis")
        for name, text, style in lines:
            if text:
                grid.add_row(Text(name, style="dim"), Text(text, style=style))
        return grid

    def _correction_lines(self) -> list[tuple[str, str, str]]:
        """The correction in use, and what the anchor does; none where the run has no merger."""
        if self._merger in ("", "none") and not (self._last_merge or self._made or self._refused):
            return []
        used = self._last_merge or "none yet"
        if self._last_merge and not self._merged_now:
            used = f"none in the last tick; before: {used}"
        refused = f", {self._refused} refused" if self._refused else ""
        state = f"ticks waited {self._waited_s:g} s{refused}; {self._made or 'no correction made yet'}"
        return [("correction", used, ""), ("anchor", state, "yellow" if self._waited_s else "dim")]


def _sizes(count: ByteCount | Sequence[int]) -> tuple[int, int]:
    """(dense, sent) of one kind."""
    if isinstance(count, ByteCount):
        return count.dense, count.message
    return int(count[0]), int(count[-1])


def _printable(value: object) -> str:
    """One short line: what another machine wrote must not move the cursor of this terminal."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(value)[:400])
    return " ".join(text.split())


def _probe(row: Mapping[str, Any]) -> str:
    """What a fidelity probe of this tick found; empty without one."""
    if number(row.get("fidelity/poisoned")):
        return "met NaN"
    kl = number(row.get("fidelity/kl"))
    if kl is None:
        return ""
    found = (number(value) for key, value in row.items() if key.startswith("fidelity/grad_cosine/"))
    cosines = sorted(cosine for cosine in found if cosine is not None)
    range_ = f", gradient cosine {cosines[0]:.2f} to {cosines[-1]:.2f}" if cosines else ""
    return f"KL {kl:.2g} nats a token{range_}"


def _score(row: Mapping[str, Any], interval: bool = True) -> str:
    value, half = number(row.get("eval/accuracy")), number(row.get("eval/interval95"))
    if value is None:
        return "–"
    return f"{100 * value:.1f}" + (f" ±{100 * half:.1f} %" if interval and half is not None else " %")


def _clock_text(seconds: float) -> str:
    whole_s = max(0, int(seconds))
    hours = f"{whole_s // 3600}:" if whole_s >= 3600 else ""
    return f"{hours}{whole_s // 60 % 60:02d}:{whole_s % 60:02d}"
