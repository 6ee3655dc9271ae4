"""``compare``: which growth and which training learn fastest, on a model and a text of the user's."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .. import api
from ..checkpoint.system import keep_freed_memory
from ..core.units import format_seconds
from ..core.yaml_text import parse
from ..training.comparison import parse_budget
from ..training.comparison.candidates import insert_text
from ..training.comparison.options import PRECISIONS
from ..training.comparison.result import TABLE, Comparison
from ..training.comparison.store import RUNS
from ..training.optimizers import KINDS
from .completion import complete_devices, complete_inits, complete_inserts, complete_models, words
from .failures import report_bus_errors
from .output import emit_json, note, quiet_transformers, table, text_width

_WIDE = 140  # characters, in which the whole table has room
_MAIN = ("init", "places", "optimizer", "lr", "last loss", "tokens")
_TEXTS = {"multiple": True, "type": click.Path(path_type=Path, exists=True)}


@click.command()
@click.argument("model", shell_complete=complete_models)
@click.option("--text", required=True, **_TEXTS, help="A file or folder of text to learn; may be given several times.")
@click.option("--base-text", **_TEXTS, help="Text like the base's own: how much of it is forgotten.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="comparison",
    show_default=True,
    help="The folder for results; a comparison that it holds goes on.",
)
@click.option(
    "--init",
    "inits",
    multiple=True,
    shell_complete=complete_inits,
    default=api.CompareOptions.inits,
    show_default=True,
    help="How new layers begin: a preset, also like 'lesa{zero_init: true}', or a recipe's file, either of them with"
    " calibrated: in front, or random_zero. The first one is the reference.",
)
@click.option(
    "--insert",
    "inserts",
    multiple=True,
    shell_complete=complete_inserts,
    default=["even"],
    show_default=True,
    help="Places of new layers, as for upscale.",
)
@click.option(
    "--optimizer",
    "optimizers",
    multiple=True,
    shell_complete=words(*KINDS),
    default=api.CompareOptions.optimizers,
    show_default=True,
    help="adamw or muon, also with the output ratio: adamw:3.",
)
@click.option(
    "--without-growing",
    multiple=True,
    metavar="WHAT",
    help="Also train the base itself: all of it, its top layers (top:N), a LoRA adapter (lora:R).",
)
@click.option("--tokens", default=api.CompareOptions.tokens, show_default=True, help="Training tokens of a run.")
@click.option("--batch", default=api.CompareOptions.batch, show_default=True, help="Windows of a step.")
@click.option("--length", default=api.CompareOptions.length, show_default=True, help="Tokens of a window.")
@click.option(
    "--held-out", default=api.CompareOptions.held_out, show_default=True, help="Windows on which losses are measured."
)
@click.option(
    "--seeds",
    default=api.CompareOptions.seeds,
    show_default=True,
    help="Runs of each candidate at its best learning rate.",
)
@click.option(
    "--lr", "rates", multiple=True, type=float, help="Only these learning rates; otherwise they are searched."
)
@click.option(
    "--rates-per-decade",
    default=api.CompareOptions.rates_per_decade,
    show_default=True,
    help="How near to each other learning rates are tried.",
)
@click.option(
    "--calibration-tokens",
    type=int,
    help="Tokens of calibrated inits for calibration; an eighth of --tokens by default.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default=PRECISIONS[0],
    show_default=True,
    help="The arithmetic; with bfloat16 (autocast) what trains stays float32.",
)
@click.option("--budget", help="End after so much time (30min, 2h) or so many training tokens (2M).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.",
              shell_complete=complete_devices)  # fmt: skip
@click.option("--workers", default=1, show_default=True, help="Runs side by side.")
@click.option("--threads", "-j", type=click.IntRange(1, 1024), help="CPU threads of a run.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON on stdout.")  # fmt: skip
def compare(
    model: str,
    text: tuple[Path, ...],
    base_text: tuple[Path, ...],
    out: Path,
    inserts: tuple[str, ...],
    rates: tuple[float, ...],
    budget: str | None,
    as_json: bool,
    **options: Any,
):
    """Compare ways to grow MODEL, and ways to train it, by training on your text.

    Each combination of --init, --insert and --optimizer trains its new layers, the base is frozen. Learning rates are
    searched with one seed until the best one has a worse one on both sides; the best one then runs with every seed.
    Stopped, or at the end of the budget, the same command goes on; more inits, seeds or budget may be given then. OUT
    has every run (runs.jsonl), table.md, curves.svg and report.html.

    \b
    Example:
      deus-merge compare ./model --text corpus.txt --optimizer adamw --optimizer muon --budget 2h
    """
    quiet_transformers()
    report_bus_errors()
    keep_freed_memory()
    settings = api.CompareOptions(
        inserts=tuple(parse(insert, "--insert").plain() for insert in inserts),
        rates=rates or None,
        budget=parse_budget(budget) if budget else api.Budget(),
        **options,
    )
    try:
        done = api.compare(
            model,
            out,
            text,
            settings,
            base_text=base_text,
            on_run=_progress(),
            on_stage=lambda stage: note(f"{stage} ..."),
        )
    except KeyboardInterrupt:
        if (out / RUNS).exists():
            note(f"finished runs are in {out}: the same command goes on")
        raise
    files = done.write() if done.runs else []
    if as_json:
        emit_json(done.describe())
        return
    if done.runs:
        _show_table(done)
    if not done.complete:
        note("the budget ended before all runs: the same command with another --budget goes on")
    if files:
        note(f"written: {', '.join(map(str, files))}")


def _show_table(done: Comparison) -> None:
    """Print the table: where there is little room, its main columns."""
    columns, rows = done.table()
    width = text_width() or shutil.get_terminal_size().columns
    if width < _WIDE:
        shown = [i for i, column in enumerate(columns) if column in _MAIN]
        columns, rows = [columns[i] for i in shown], [[row[i] for i in shown] for row in rows]
        note(f"all columns: {done.folder / TABLE}")
    table("", columns, rows, right=tuple(range(3, len(columns))))


def _progress() -> Callable[[Any, int, float], None]:
    """Reports each run in a line."""
    began, count = time.monotonic(), 0

    def line(run: Any, left: int, seconds: float) -> None:
        nonlocal count
        count += 1
        places = f" {insert_text(json.loads(run['insert']))}" if run["insert"] else ""
        note(
            f"[{count} of about {count + left}] {run['init']}{places}, {run['optimizer']}, lr {run['lr']:g},"
            f" seed {run['seed']}: {run['initial']:.4f} -> {run['final']:.4f}"
            f" ({format_seconds(time.monotonic() - began)}, about {format_seconds(seconds)} left)"
        )

    return line
