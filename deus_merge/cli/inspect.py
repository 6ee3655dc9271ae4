"""``verify``, ``report`` and ``inspect``: the commands that look at a model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from .. import api
from ..core.typed_json import parse
from ..core.units import format_count, format_size
from ..core.urls import redacted
from ..plan.training_memory import TrainingMemory, TrainingSettings
from .completion import complete_models
from .failures import report_bus_errors
from .options import training_options
from .output import echo, emit_json, note, quiet_transformers, show_verification, table
from .plan_view import quantized_text, training_text
from .progress import check_progress, steps
from .similarity import show_similarity

_SAID = {"True": "yes", "False": "no"}
_EXPERT = re.compile(r"experts\.(\d+)\.")


@click.command()
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--logits", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="TEXT",
              help="A text file: also compare logits of base and output on it.")  # fmt: skip
@click.option("--quick", is_flag=True, help="Leave out finite values, the tokenizer, and building the model.")
@click.option("--strict", is_flag=True, help="Fail also if a check is impossible (a source is missing).")
@click.option("--source", "sources", multiple=True, metavar="NAME=PLACE",
              help="The folder or address (s3://bucket/model ...) of a source that the manifest does not name, or that"
                   " has moved.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
@click.pass_context
def verify(
    ctx: click.Context, out: Path, logits: Path | None, quick: bool, strict: bool, sources: tuple[str, ...],
    as_json: bool,
):  # fmt: skip
    """Check every byte of OUT against its manifest, its sources and transformers. Exit code 3 when a check fails.

    \b
    Example:
      deus-merge verify ./deeper --logits text.txt
    """
    text = None
    if logits:
        with logits.open(encoding="utf-8", errors="replace") as file:
            text = file.read(20_000)
    quiet_transformers()
    report_bus_errors()
    places = {}
    for item in sources:
        address = re.fullmatch(r"([^=]+)=([A-Za-z][A-Za-z0-9+.-]*://.*)", item, re.DOTALL)  # a signature may have =
        name, place = address.groups() if address else item.rpartition("=")[::2]
        if not name or not place:
            raise click.BadParameter(f"{redacted(item)!r} is not NAME=PLACE", param_hint="--source")
        places[name] = place
    with check_progress() as progress:
        result = api.verify(out, quick=quick, logits_text=text, strict=strict, sources=places, **progress)
    if as_json:
        emit_json(result.describe())
    else:
        show_verification(result)
    if not result.passed:
        note(f"{out} failed verification: {', '.join(c.name for c in result.failed)}")
        ctx.exit(3)


@click.command()
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="The page to write; by default report.html in OUT.")  # fmt: skip
@click.option("--verify", "full", is_flag=True, help="Verify in full first; by default as verify --quick does.")
@click.pass_context
def report(ctx: click.Context, out: Path, html: Path | None, full: bool):
    """Write one self-contained HTML page about OUT: layer map, parameters, alignment, verification, next steps, recipe.

    \b
    Example:
      deus-merge report ./deeper --html deeper.html
    """
    quiet_transformers()
    with check_progress() as progress:
        result = api.verify(out, quick=not full, **progress)
    echo(str(api.report(out, html, verification=result)))
    if not result.passed:
        note(f"{out} failed verification")
        ctx.exit(3)


@click.command()
@click.argument("model", shell_complete=complete_models)
@click.option("--similarity", is_flag=True, help="Transport cost and alignment of each adjacent pair of layers.")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the similarity into a file (png, svg, pdf)."
)
@click.option("--scores", is_flag=True, help="How much a new layer in each gap could learn from the text.")
@click.option("--text", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Scores: the text.")
@click.option("--tokens", default=16_384, show_default=True, help="Scores: tokens of the text that are used at most.")
@click.option("--damping", default=0.3, show_default=True, help="Scores: as for calibrate.")
@click.option("--allow-pickle", is_flag=True, help="Also read .bin and .pt weights: their tensors, nothing is run.")
@click.option("--stream", is_flag=True, help="Read a model of the hub by range, without a local copy.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON on stdout.")
@training_options
def inspect(
    model: str, similarity: bool, plot: Path | None, scores: bool, text: Path | None, tokens: int, damping: float,
    allow_pickle: bool, stream: bool, as_json: bool, training: TrainingSettings,
):  # fmt: skip
    """Show MODEL's family, layers, heads and sizes; of a deeper model also the memory that training its new layers
    takes.

    \b
    Example:
      deus-merge inspect ./SmolLM2-135M --similarity --plot similarity.png
    """
    from ..report.inspection import adjacent_similarity, check_plotting, plot_similarity, summary

    report_bus_errors()
    if text and not scores:
        raise click.UsageError("--text is for --scores")
    if plot:
        check_plotting()
    load = api.LoadOptions(allow_pickle, stream=stream)
    facts = summary(model, load, training)
    if similarity or plot:
        pairs = facts["layers"] - 1
        facts["similarity"] = rows = []
        with steps(pairs, "pair of layers") as shown:
            shown.fraction("layers 0 and 1")
            for row in adjacent_similarity(model, load):
                rows.append(row)
                lower, upper = row["layers"]
                shown.end(f"layers {lower} and {upper}")
                if upper < pairs:
                    shown.fraction(f"layers {upper} and {upper + 1}")
    if scores:
        facts["scores"] = _scores(model, text, tokens, damping, load)
    if plot:
        plot_similarity(facts["similarity"], plot)
    if as_json:
        emit_json(facts)
        return
    shown = {k: v for k, v in facts.items() if k not in ("similarity", "scores", "roles", "layouts", "layer_kinds")}
    shown["bytes"] = format_size(shown["bytes"])
    for name in ("parameters", "new_parameters"):
        if name in shown:
            shown[name] = f"{format_count(shown[name])} ({shown[name]:,})"
    if memory := shown.get("training_memory"):
        shown["training_memory"] = training_text(parse(TrainingMemory, memory))
    if "quantized" in shown:
        shown["quantized"] = quantized_text(shown["quantized"])
    table("", ["", ""], [[k.replace("_", " "), _SAID.get(str(v), str(v))] for k, v in shown.items()])
    for layout in facts["layouts"]:
        click.echo()
        _layout_table(layout)
    if any(facts["layer_kinds"]):
        click.echo()
        table("layers", ["layers", "kind"], _runs(facts["layer_kinds"]))
    if "similarity" in facts:
        click.echo()
        show_similarity(facts["similarity"])
    if scores:
        click.echo()
        _score_table(facts["scores"])


def _scores(model: str, text: Path | None, tokens: int, damping: float, load: api.LoadOptions) -> list[dict]:
    """The score of each gap, as JSON data."""
    from ..recipe.calibrate import read_text

    if text is None:
        raise click.UsageError("--scores needs --text FILE")
    quiet_transformers()
    options = api.CalibrationOptions(tokens=tokens, length=min(256, max(2, tokens // 2)), damping=damping)
    content = read_text(text, "--text")
    with steps(0, "gap") as shown:

        def finished(step: api.Progress) -> None:
            shown.end(step.title, total=step.total)

        found = api.score_gaps(model, content, options, load_options=load, progress=finished)
    return [gap.describe() for gap in found]


def _score_table(rows: list[dict]) -> None:
    top = max(row["score"] for row in rows) or 1.0
    body = [
        [str(r["after"]), f"{r['score']:.4f}", f"{r['gradient']:.3g}", "█" * round(20 * r["score"] / top)] for r in rows
    ]
    table("expansion scores of the gaps", ["after", "score", "gradient", ""], body, right=(0, 1, 2))


def _layout_table(layout: Mapping[str, Any]) -> None:
    """The tensors of a layer; those that only the number of an expert tells apart in one row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    prefix = os.path.commonprefix([role["tensor"] for role in layout["roles"]]).rpartition(".")[0]
    begin = len(prefix) + 1 if prefix else 0
    for role in layout["roles"]:
        number = _EXPERT.search(role["role"])
        cells = [role["role"], role["tensor"][begin:], str(role["shape"]), role["reads"] or "-", role["writes"] or "-"]
        if number:
            cells = [re.sub(rf"\b(experts|neurons)\.{number[1]}\b", r"\1.*", text) for text in cells]
        rows.setdefault(tuple(cells), []).append(number[1] if number else "")
    body = [[*cells, f"{len(numbers)} experts" if numbers[1:] else ""] for cells, numbers in rows.items()]
    count = len(layout["layers"])
    kind = f", {layout['kind']}" if layout["kind"] else ""
    same = f" ({count} such layers)" if count > 1 else ""
    under = f": tensors under {prefix}." if prefix else ""
    columns = ["role", "tensor", "shape", "reads", "writes"]
    if any(row[-1] for row in body):
        columns.append("")
    table(f"layer {layout['layers'][0]}{kind}{same}{under}", columns, [row[: len(columns)] for row in body])


def _runs(kinds: list[str]) -> list[list[str]]:
    """Rows of a table: neighbouring layers of one kind, and the kind."""
    rows, first = [], 0
    for kind, same in groupby(kinds):
        last = first + len(list(same)) - 1
        rows.append([f"{first}–{last}" if last > first else str(first), kind])
        first = last + 1
    return rows
