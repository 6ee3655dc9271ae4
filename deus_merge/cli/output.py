"""Tables and progress. Requested output goes to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click

from ..core.errors import json_text, printable
from ..core.text import plural
from ..core.units import dtype_name, format_count, format_seconds, format_size
from ..methods.registry import methods
from ..plan.blocks import BlockPlan
from ..plan.fit import Fit
from ..plan.training_memory import TrainingMemory, TrainingSettings
from ..plan.types import Plan, quantized_of
from ..report.manifest_parts import CalibratedLayer
from ..run.pieces import Share
from ..verify import Verification


def echo(text: str, err: bool = False) -> None:
    """Print lines of text. Control characters are escaped, since names in the text may be hostile."""
    click.echo("\n".join(printable(line) for line in text.split("\n")), err=err)


def emit_json(data: object) -> None:
    """Print one JSON document on stdout."""
    click.echo(json_text(data, indent=2))


def note(text: str, quiet: bool = False) -> None:
    """Print one line for people on stderr. A closed pipe does not stop the run."""
    if quiet:
        return
    try:
        echo(text, err=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def quiet_transformers() -> None:
    """Switch off progress bars and notices of transformers. Must be called before transformers is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def warn(warnings: tuple[str, ...]) -> None:
    """Print warnings on stderr."""
    for warning in warnings:
        note(f"warning: {warning}")


def table(title: str, columns: list[str], rows: list[list[str]], right: tuple[int, ...] = ()) -> None:
    """Print a table on stdout; columns whose indices are in ``right`` are aligned to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        grid.add_column(column, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text("\n".join(map(printable, str(cell).split("\n")))) for cell in row))

    class Pipe(Console):
        """A console that leaves a closed pipe to the command line; rich would end the process with exit code 1."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    terminal = sys.stdout.isatty()
    Pipe(highlight=False, width=None if terminal else 160, soft_wrap=False).print(grid)


@contextmanager
def progress(plan: Plan, quiet: bool) -> Iterator[Callable[[BlockPlan, bool], None]]:
    """Yields the ``on_block`` callback: a progress bar on a terminal, one line per block otherwise."""
    total, started = len(plan.blocks), time.monotonic()
    if quiet:
        yield lambda block, resumed: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("merging", total=total)
            yield lambda block, resumed: bar.update(task, advance=1, description=block.title)
    else:

        def line(block: BlockPlan, resumed: bool) -> None:
            how = "finished by the earlier run" if resumed else block.how
            note(f"[{block.index + 1}/{total}] {block.title}: {how} ({time.monotonic() - started:.1f} s)")

        yield line


def show_share(share: Share, out: Path, quiet: bool, as_json: bool) -> None:
    """Print what a worker has made, and what is left."""
    warn(share.warnings)
    if as_json:
        emit_json({
            "made": [piece.name for piece in share.made],
            "found": [piece.name for piece in share.found],
            "left": share.left,
            "complete": share.complete,
            "warnings": list(share.warnings),
        })  # fmt: skip
    found = f", {len(share.found)} finished already" if share.found else ""
    left = f"{share.left} of the output left" if share.left else f"deus-merge finish puts {out} together"
    left = f"{out} is complete" if share.complete else left
    note(f"{plural(len(share.made), 'piece')} made{found}; {left}", quiet)


def layer_notes(quiet: bool = False) -> Callable[[CalibratedLayer, bool], None]:
    """The ``on_layer`` callback: one line for each calibrated layer."""

    def line(layer: CalibratedLayer, resumed: bool) -> None:
        step = f"{layer.loss_before:.4f} -> {layer.loss_after:.4f}" if layer.tensors else "no step lowers the loss"
        note(f"layer {layer.layer}: {'finished by the earlier run, ' if resumed else ''}{step}", quiet)

    return line


def show_plan(plan: Plan, training: TrainingSettings | None = None) -> None:
    """Print the layer map and the totals, after those of the documents that the plan needs.

    Args:
        plan: The plan.
        training: How the new layers are trained; None for the defaults.
    """
    for document in plan.documents:
        count = sum(document.runs.values())
        cached = f"{document.cached_blocks} at a time in memory"
        how = f"{count} blocks are computed when they are read, {cached}" if count else "only copied from"
        echo(f"document {document.name}, not written: {how}")
        _layer_table(document.plan)
        click.echo()
    _layer_table(plan)
    click.echo()
    if plan.vocabulary:
        click.echo("tokenizer {tokenizer}: {tokens} tokens, {rows} rows".format(**plan.vocabulary))
    layers = f"{plan.donor.view.num_layers} -> {plan.num_layers} layers, {len(plan.new_layers)} new"
    same = "; computes the same function as the base" if plan.function_preserving and not plan.calibration else ""
    click.echo(f"{layers}{same}")
    if plan.calibration:
        echo(str(plan.calibration))
    if any(map(quantized_of, plan.models)):
        dtypes = sorted({dtype_name(o.dtype) for _, o in plan.outputs if not o.quantization})
        written = f"{quantized_text(plan.quantized)}, byte for byte" if plan.quantized else "nothing quantised"
        echo(f"writes {written}; all else in {' and '.join(dtypes)}")
    files = "1 file" if len(plan.shards) == 1 else f"{len(plan.shards)} files"
    click.echo(
        f"reads {format_size(plan.bytes_read)}, writes {format_size(plan.bytes_written)} in {files}; "
        f"about {format_size(plan.peak_memory)} of memory, {format_seconds(plan.seconds)}"
    )
    old, new = plan.shape.parameters - plan.shape.new_parameters, plan.shape.new_parameters
    click.echo(f"{format_count(old)} -> {format_count(old + new)} parameters, {format_count(new)} new")
    if memory := plan.training_memory(training):
        click.echo(f"training the new layers: {training_text(memory)}")
    click.echo(f"plan {plan.hash}")


def training_text(memory: TrainingMemory) -> str:
    """The estimate of the memory for training in one line."""
    how = memory.settings
    terms = {
        "base": memory.base_weights, "new layers": memory.new_weights, "gradients": memory.gradients,
        how.optimizer: memory.optimizer_states, "copies": memory.copies, "activations": memory.activations,
        "loss": memory.loss, "overhead": memory.overhead,
    }  # fmt: skip
    listed = ", ".join(f"{name} {format_size(size)}" for name, size in terms.items())
    checkpointing = " with checkpointing" if how.checkpointing else ""
    return f"about {format_size(memory.peak)} for {how.batch} x {how.length} tokens{checkpointing} ({listed})"


def fit_text(fit: Fit) -> str:
    """The choice of new layers in one line."""
    places = json.dumps(fit.insert, ensure_ascii=False)
    return f"{fit.layers} new layers of at most {fit.most} fit into {format_size(fit.memory)}: --insert '{places}'"


def quantized_text(share: Mapping[str, Mapping[str, float]]) -> str:
    """`quantized_share` in words."""
    return ", ".join(f"{name}: {of['weights']} weights at {of['bits']} bits" for name, of in share.items())


def _layer_table(plan: Plan) -> None:
    """Print the sources of a plan's blocks, with models as letters."""
    names = {i: f"{m.ref}" for i, m in enumerate(plan.models)}
    short = {i: chr(ord("A") + i) if i < 26 else f"M{i}" for i in names}
    for i, name in names.items():
        view = plan.models[i].view
        family = view.family.name if view.family else f"{view.model_type} (by tensor names)"
        role = ", base" if plan.models[i] is plan.donor else ""
        codes = f", {quantized_text(share)}" if (share := quantized_of(plan.models[i])) else ""
        echo(f"{short[i]} = {name}  [{family}, {view.num_layers} layers{codes}{role}]")
    click.echo()
    rows = []
    for block in plan.blocks:
        sources = [short[s.model] + (f" {s.layer}" if s.layer is not None else "") for s in block.sources]
        origin = f"{sources[0]} to {sources[-1]}" if methods()[block.method].learns else " + ".join(sources)
        rows.append([block.title, origin, block.method, block.how, "new" if block.new else ""])
    table("", ["output", "from", "method", "how", ""], rows)


def show_verification(result: Verification) -> None:
    """Print the checks of a verification as a table."""
    marks = {True: "ok", False: "FAILED", None: "skipped"}
    table("", ["check", "result", "detail"], [[c.name, marks[c.passed], c.detail] for c in result.checks])
