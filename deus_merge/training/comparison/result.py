"""The results of a comparison: a table, a plot and a page."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ...core.tables import html_table
from ...core.text import plural
from ...core.units import format_size
from ...report.page import render
from ...report.page.figures import number
from .candidates import Candidate, insert_text
from .search import SEED, best_lr, best_runs, by_candidate
from .statistics import Interval, Run, Runs, at_compute, difference, interval, mean, token_ratio

TABLE, PLOT, PAGE = "table.md", "curves.svg", "report.html"
_COLUMNS = (
    "init", "places", "optimizer", "lr", "seeds", "first loss", "last loss", "difference", "tokens", "at equal FLOPs",
    "base's text", "trained", "memory", "TFLOP", "s",
)  # fmt: skip
LEGEND = """Losses in nats a token on held-out text, means over seeds. *Difference*: of the last loss to that of the
first row, the reference, seed by seed (the same windows in the same order), with its 95 % interval. *Tokens*: those
needed to reach the reference's last loss, over the reference's; the difference becomes tokens by the slope of the
reference's curve. *At equal FLOPs*: the difference where both have computed as much as the cheaper one does in all
(calibration not counted). *Base's text*: the change of the loss on the other text. *Memory*: weights, gradients,
optimizer states, and what the backward pass keeps. A rate in brackets is the lowest or highest that was tried: a
better one may lie beyond."""


@dataclass(frozen=True)
class Row:
    """One candidate at its best learning rate.

    Attributes:
        candidate: The candidate.
        lr: Its best learning rate.
        bracketed: Whether worse rates were tried on both sides.
        rates: The last loss of the search by learning rate.
        runs: Its runs by seed.
        difference: Of the last loss to the reference's.
        tokens: Tokens needed for the reference's last loss, over the reference's.
        equal_compute: Difference of losses at equal computation.
        forgotten: By how much the loss on the base's text rose; None without one.
    """

    candidate: Candidate
    lr: float
    bracketed: bool
    rates: Mapping[float, float]
    runs: Runs
    difference: Interval | None
    tokens: Interval | None
    equal_compute: Interval | None
    forgotten: Interval | None

    def describe(self) -> dict[str, Any]:
        """The row as JSON data."""

        def finite(value: float, digits: int = 5) -> float | None:  # JSON has no infinity
            return round(value, digits) if math.isfinite(value) else None

        def ends(value: Interval | None) -> list[float] | None:
            if value is None or not math.isfinite(value.mean):
                return None
            return [round(float(x), 6) for x in value if x == x]

        return {
            **vars(self.candidate),
            "lr": self.lr,
            "bracketed": self.bracketed,
            "rates": {f"{lr:g}": finite(loss) for lr, loss in sorted(self.rates.items())},
            "seeds": len(self.runs),
            "initial": finite(mean(self.runs, "initial")),
            "final": finite(mean(self.runs, "final")),
            "difference": ends(self.difference),
            "tokens": ends(self.tokens),
            "equal_compute": ends(self.equal_compute),
            "forgotten": ends(self.forgotten),
            **{name: next(iter(self.runs.values()))[name] for name in ("new_layers", "trained", "memory", "tflop")},
            "seconds": round(mean(self.runs, "seconds"), 1),
        }

    def cells(self) -> list[str]:
        """The row as texts, for `_COLUMNS`."""
        one, form = next(iter(self.runs.values())), "+.4f"
        return [
            self.candidate.init,
            insert_text(self.candidate.places) if self.candidate.insert else "",
            self.candidate.optimizer,
            f"{self.lr:g}" if self.bracketed else f"({self.lr:g})",
            str(len(self.runs)),
            f"{mean(self.runs, 'initial'):.4f}",
            f"{mean(self.runs, 'final'):.4f}",
            _cell(self.difference, form),
            "" if self.tokens is None else _times(self.tokens),
            _cell(self.equal_compute, form),
            _cell(self.forgotten, "+.3f"),
            f"{one['trained'] / 1e6:.2f} M",
            format_size(one["memory"]),
            number(one["tflop"]),
            f"{mean(self.runs, 'seconds'):.0f}",
        ]


@dataclass(frozen=True)
class Comparison:
    """The results of `compare`. ``str()`` is the table; in a notebook it is shown with the plot.

    Attributes:
        folder: The folder of the results.
        candidates: What is compared; the first one is the reference.
        runs: Every result.
        fixed: The settings that all runs share.
        complete: Whether every candidate has its rate and its seeds; else the budget ended.
        names: What ``model``, ``text`` and ``base_text`` of the settings are called: files, or ids of the hub.
    """

    folder: Path
    candidates: tuple[Candidate, ...]
    runs: tuple[Run, ...] = field(repr=False)
    fixed: Mapping[str, Any]
    complete: bool
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """The candidates that have run: the reference, then the others by their last loss."""
        found = by_candidate(self.runs)
        done = [c for c in self.candidates if best_lr(found[c]) is not None]
        reference = best_runs(found[done[0]]) if done else {}
        rows = [_row(c, found[c], {} if c == done[0] else reference) for c in done]
        return rows[:1] + sorted(rows[1:], key=_place)

    def describe(self) -> dict[str, Any]:
        """The results as JSON data."""
        return {
            "folder": str(self.folder),
            "complete": self.complete,
            "settings": dict(self.fixed),
            "names": dict(self.names),
            "rows": [row.describe() for row in self.rows],
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """The columns that have values, and the rows of the table."""
        rows = [row.cells() for row in self.rows]
        used = [i for i in range(len(_COLUMNS)) if any(row[i] for row in rows)]
        return [_COLUMNS[i] for i in used], [[row[i] for i in used] for row in rows]

    def markdown(self) -> str:
        """The table in Markdown."""
        columns, rows = self.table()
        lines = [columns, ["---"] * len(columns), *rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)

    def __str__(self) -> str:
        return self.markdown()

    def __repr__(self) -> str:
        state = "complete" if self.complete else "not complete"
        counts = f"{plural(len(self.candidates), 'candidate')}, {plural(len(self.runs), 'run')}"
        return f"Comparison({self.folder}: {counts}, {state})"

    def _repr_html_(self) -> str:
        plot = self.plot() or ""
        return f"{plot[plot.find('<svg') :]}{html_table(*self.table())}"

    def plot(self) -> str | None:
        """Held-out loss against tokens, and differences to the reference with 95 % bands, as SVG. None without
        matplotlib (``pip install "deus-merge[plot]"``)."""
        try:
            import matplotlib
        except ImportError:
            return None
        return _plot(matplotlib, self.rows) if self.rows else None

    def write(self) -> list[Path]:
        """Write ``table.md``, ``curves.svg`` (with matplotlib) and ``report.html`` to the folder.

        Returns:
            The files.
        """
        plot = self.plot()
        texts = {TABLE: f"{self.markdown()}\n\n{LEGEND}\n", PAGE: self.page(plot)} | ({PLOT: plot} if plot else {})
        for name, text in texts.items():
            (self.folder / name).write_text(text, encoding="utf-8")
        return [self.folder / name for name in texts]

    def page(self, plot: str | None) -> str:
        """A page of HTML that needs no other file."""
        columns, rows = self.table()
        values = {
            "title": "Comparison",
            "complete": self.complete,
            "columns": columns,
            "rows": rows,
            "settings": {name: value for name, value in self.fixed.items() if value != ""},
            "names": self.names,
            "plot": Markup(plot[plot.find("<svg") :]) if plot else None,
        }
        return render("comparison.html", values)


def _cell(value: Interval | None, form: str) -> str:
    """An interval as text; nothing where both of two runs diverged."""
    return "" if value is None or math.isnan(value.mean) else format(value, form)


def _times(value: Interval) -> str:
    """A factor as text: what is far from 1 is an extrapolation, of which no digits are known."""

    def one(x: float) -> str:
        return "<0.01" if x < 0.01 else ">100" if x > 100 else f"{x:.2f}"

    return one(value.mean) if math.isnan(value.low) else f"{one(value.mean)} [{one(value.low)}, {one(value.high)}]"


def _place(row: Row) -> float:
    """What rows are sorted by: the difference; runs that diverged are last."""
    apart = row.difference.mean if row.difference else 0.0
    return math.inf if math.isnan(apart) else apart


def _row(candidate: Candidate, rates: Mapping[float, Runs], reference: Runs) -> Row:
    lr = best_lr(rates)
    assert lr is not None
    runs, tried = rates[lr], sorted(rates)
    has_base = all("base_before" in run for run in runs.values())
    return Row(
        candidate,
        lr,
        tried[0] < lr < tried[-1],
        {lr: of[SEED]["final"] for lr, of in rates.items() if SEED in of},
        runs,
        difference(runs, reference),
        token_ratio(runs, reference) if reference else None,
        _equal_compute(runs, reference),
        interval([run["base_after"] - run["base_before"] for run in runs.values()]) if has_base else None,
    )


def _equal_compute(runs: Runs, reference: Runs) -> Interval | None:
    seeds = sorted(runs.keys() & reference.keys())
    if not seeds:
        return None
    tflop = min(runs[seeds[0]]["tflop"], reference[seeds[0]]["tflop"])
    return interval([at_compute(runs[s], tflop) - at_compute(reference[s], tflop) for s in seeds])


def _plot(matplotlib: Any, rows: Sequence[Row]) -> str:
    import numpy as np

    matplotlib.use("svg")
    settings = {"svg.hashsalt": "deus_merge", "font.size": 9}
    with matplotlib.rc_context(settings):
        from matplotlib import pyplot

        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
        reference = rows[0].runs
        for row in rows:
            seeds = sorted(row.runs.keys() & reference.keys())
            if not seeds:
                continue
            curves = [row.runs[s]["curve"] for s in seeds]
            tokens = np.array([t for t, _ in curves[0]], dtype=float)
            losses = np.array([[loss for _, loss in curve] for curve in curves])  # (s, p)
            losses[~np.isfinite(losses)] = np.nan
            (line,) = left.plot(tokens, losses.mean(0), label=str(row.candidate))
            known = np.array([[t for t, _ in reference[s]["curve"]] for s in seeds], dtype=float)
            theirs = np.array([[loss for _, loss in reference[s]["curve"]] for s in seeds])
            apart = losses - [np.interp(tokens, at, of) for at, of in zip(known, theirs, strict=True)]
            bands = [interval(column) for column in apart.T]
            right.plot(tokens, [band.mean for band in bands], color=line.get_color())
            ends = [band.low for band in bands], [band.high for band in bands]
            right.fill_between(tokens, *ends, color=line.get_color(), alpha=0.15, linewidth=0)
        left.set(xlabel="training tokens", ylabel="held-out loss, nats a token")
        right.set(xlabel="training tokens", ylabel=f"difference to {rows[0].candidate}")
        left.legend(fontsize=7)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return file.getvalue()
