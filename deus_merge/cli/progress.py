"""Progress of long commands on stderr: a bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..api import Progress
from ..core.errors import printable
from ..core.text import plural
from ..core.units import format_seconds
from ..plan.blocks import BlockPlan
from ..plan.pieces import pieces, share
from ..plan.types import Plan
from ..report.manifest_parts import CalibratedLayer
from ..run.events import unheard
from .output import emit_line, note

INTERVAL = 5.0  # seconds from one line to the next, at least
SILENCE = 30.0  # seconds after which a step that reports nothing gets a line


class Steps:
    """The steps of a long command: which have ended, and how far those have come that have begun.

    Args:
        total: How many steps there are; 0 while that is not known.
        noun: What a step is.
        bar: Shows a title, the number of ended steps with the fractions of those that have begun, and the total; None
            for lines.
        quiet: Whether nothing is shown.
        by: Who has finished the steps that are not made now.
    """

    def __init__(self, total: int, noun: str, bar: Callable[[str, float, int], None] | None, quiet: bool = False,
                 by: str = "the earlier run"):  # fmt: skip
        self.total, self._noun, self._bar, self._quiet, self._by = total, noun, bar, quiet, by
        self._ended = self._resumed = 0
        self._open: dict[str, tuple[float, float]] = {}  # title -> when it began, its fraction
        self._began = self._last = time.monotonic()
        self._lock = threading.Lock()

    def fraction(self, title: str, fraction: float = 0.0) -> None:
        """A step begins, or this fraction of it is done. May be called from any thread."""
        with self._lock:
            now = time.monotonic()
            began, _ = self._open.get(title, (now, 0.0))
            self._open[title] = began, fraction
            line = f"{title}: {fraction:.0%} in {_seconds(now - began)}" if 0 < fraction < 1 else None
            self._show(title, line, now)

    def end(self, title: str, detail: str = "", resumed: bool = False, total: int | None = None) -> None:
        """A step has ended.

        Args:
            title: Its title.
            detail: What was done in it.
            resumed: Whether an earlier run had done it.
            total: How many steps there are, where this is known only now.
        """
        with self._lock:
            now = time.monotonic()
            began, _ = self._open.pop(title, (None, 0.0))
            self._ended += 1
            self._resumed += resumed
            self.total = self.total if total is None else total
            if self._resumed and (not resumed or self._ended == self.total):
                note(f"{plural(self._resumed, self._noun)} finished by {self._by}", self._quiet)
                self._resumed = 0
            what = f"{title}: {detail}" if detail else title
            own = "" if began is None else f" in {_seconds(now - began)}"
            self._show(title, None if resumed else f"{what}{own}", now)

    def phase(self, title: str) -> None:
        """All steps have ended, and something else begins."""
        with self._lock:
            self._show(title, None, time.monotonic())

    def still(self) -> None:
        """A line about a step that has begun, if none was printed for long."""
        with self._lock:
            now = time.monotonic()
            if self._open and now - self._last >= SILENCE:
                title, (began, fraction) = next(iter(self._open.items()))
                what = f"{fraction:.0%} in" if fraction else "running for"
                self._show(title, f"{title}: {what} {_seconds(now - began)}", now)

    def _show(self, title: str, line: str | None, now: float) -> None:
        """Show the present state; a line only if none was printed for a while."""
        if self._bar:
            self._bar(title, self._ended + sum(fraction for _, fraction in self._open.values()), self.total)
        elif line is not None and not self._quiet and now - self._last >= INTERVAL:
            self._last = now
            note(f"[{self._ended}/{self.total}] {line} ({_seconds(now - self._began)} so far)")


@contextmanager
def steps(total: int, noun: str = "step", quiet: bool = False, by: str = "the earlier run") -> Iterator[Steps]:
    """Yields the steps of a long command, shown in the way that fits stderr; quietly, not at all."""
    if not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _bar(total) as show:
            yield Steps(total, noun, show, by=by)
        return
    shown, over = Steps(total, noun, None, quiet, by), threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            shown.still()

    watching = threading.Thread(target=watch, name="progress", daemon=True)
    watching.start()
    try:
        yield shown
    finally:
        over.set()
        watching.join()


@contextmanager
def _bar(total: int) -> Iterator[Callable[[str, float, int], None]]:
    """Yields a function that moves a bar, which disappears at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    title = TextColumn("{task.description}", markup=False, table_column=Column(max_width=30, no_wrap=True))
    columns: Any = (title, BarColumn(bar_width=None), TextColumn("{task.fields[count]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task("", total=total or None, count="")

        def show(title: str, done: float, total: int) -> None:
            count = f"{int(done)}/{total}" if total else ""
            bar.update(task, completed=done, total=total or None, description=printable(title), count=count)

        yield show


class PlanSteps:
    """The callbacks of `api.merge` that show the progress of a plan's blocks."""

    def __init__(self, shown: Steps, count: int, last: str, quiet: bool):
        self._steps, self._left, self._last = shown, count, last
        self.on_layer, self.on_event = layer_notes(quiet), unheard

    def on_block(self, block: BlockPlan, resumed: bool) -> None:
        """A block has ended."""
        self._steps.end(block.title, block.how, resumed)
        self._left -= 1
        if not self._left:
            self._steps.phase(self._last)

    def on_fraction(self, block: BlockPlan, fraction: float) -> None:
        """This fraction of a block is written."""
        self._steps.fraction(block.title, fraction)


@contextmanager
def block_progress(
    plan: Plan,
    quiet: bool = False,
    shard_of: tuple[int, int] | None = None,
    by: str = "the earlier run",
    *,
    as_json: bool = False,
) -> Iterator[PlanSteps | EventLines]:
    """Yields the callbacks of `api.merge`.

    Args:
        plan: The plan.
        quiet: Whether nothing is shown.
        shard_of: The number of a share and how many there are, where only this one is made.
        by: Who has finished the blocks that are not made now.
        as_json: Whether events are printed as JSON in place of the progress.
    """
    if as_json and not quiet:
        yield EventLines()
        return
    count = sum(len(piece.blocks) for piece in share(pieces(plan), *shard_of)) if shard_of else len(plan.blocks)
    with steps(count, "block", quiet, by) as shown:
        yield PlanSteps(shown, count, "calibrating" if plan.calibration and not shard_of else "checking", quiet)


class EventLines:
    """The callbacks of `api.merge` that print what happens as JSON, one event a line on stderr: with ``--json``."""

    on_fraction = None

    def __init__(self) -> None:
        self._began = time.monotonic()

    def on_event(self, event: Mapping[str, object]) -> None:
        """Print an event."""
        emit_line({"event": event["event"], "at": round(time.monotonic() - self._began, 3), **event})

    def on_block(self, block: BlockPlan, resumed: bool) -> None:
        """A block has ended: what this run makes tells of itself."""
        if resumed:
            self.on_event({"event": "block found", "block": block.title, "index": block.index})

    def on_layer(self, layer: CalibratedLayer, resumed: bool) -> None:
        """A layer is calibrated."""
        losses = {"loss_before": layer.loss_before, "loss_after": layer.loss_after}
        self.on_event({"event": "layer calibrated", "layer": layer.layer, **losses, "found": resumed})


@contextmanager
def check_progress(quiet: bool = False) -> Iterator[dict[str, Any]]:
    """Yields the arguments of `api.verify` that show the progress of its checks."""
    with steps(0, "check", quiet) as shown:

        def ended(step: Progress) -> None:
            shown.end(step.title, total=step.total)

        yield {"on_begin": shown.fraction, "progress": ended}


def layer_notes(quiet: bool = False) -> Callable[[CalibratedLayer, bool], None]:
    """The ``on_layer`` callback: one line for each calibrated layer."""

    def line(layer: CalibratedLayer, resumed: bool) -> None:
        step = f"{layer.loss_before:.4f} -> {layer.loss_after:.4f}" if layer.tensors else "no step lowers the loss"
        note(f"layer {layer.layer}: {'finished by the earlier run, ' if resumed else ''}{step}", quiet)

    return line


def _seconds(seconds: float) -> str:
    """With a tenth of a second where that can be seen."""
    return f"{seconds:.1f} s" if seconds < 10 else format_seconds(seconds)
