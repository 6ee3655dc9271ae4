"""Text, notes, tables and JSON. Requested output goes to stdout, everything else to stderr."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap

import click

from ..core.errors import json_text, printable
from ..verify import Verification
from .messages import label


def echo(text: str) -> None:
    """Print lines of text on stdout."""
    click.echo(_safe(text))


def echo_wrapped(text: str) -> None:
    """Print a paragraph on stdout, wrapped to the width of tables."""
    width = text_width() or shutil.get_terminal_size().columns
    wrapper = textwrap.TextWrapper(width, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
    click.echo(wrapper.fill(_safe(text)))  # paths stay in one piece


def emit_json(data: object) -> None:
    """Print one JSON document on stdout."""
    click.echo(json_text(data, indent=2))


def emit_line(data: object) -> None:
    """Print JSON as one line on stderr."""
    _to_stderr(json_text(data))


def note(text: str, quiet: bool = False) -> None:
    """Print one line for people on stderr."""
    if not quiet:
        _to_stderr(_safe(text))


def warn(warnings: tuple[str, ...]) -> None:
    """Print warnings on stderr."""
    for warning in warnings:
        _to_stderr(f"{label('warning')} {_safe(warning)}")


def _safe(text: str) -> str:
    """Lines of text whose control characters are escaped, since names in the text may be hostile."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _to_stderr(text: str) -> None:
    """Print on stderr. A closed pipe does not stop the run."""
    try:
        click.echo(text, err=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def quiet_transformers() -> None:
    """Switch off progress bars and notices of transformers. Must be called before transformers is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def table(title: str, columns: list[str], rows: list[list[str]], right: tuple[int, ...] = ()) -> None:
    """Print a table on stdout; columns whose indices are in ``right`` are aligned to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(
        title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=any(columns)
    )
    for i, column in enumerate(columns):
        grid.add_column(column, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text("\n".join(map(printable, str(cell).split("\n")))) for cell in row))
    console = Console(highlight=False, width=text_width())
    with console.capture() as captured:
        console.print(grid)
    click.echo("\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n")))


def text_width() -> int | None:
    """The width of tables in characters: ``COLUMNS``, else that of the terminal (None), else enough for most tables."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns) > 0:
        return int(columns)
    return None if sys.stdout.isatty() else 160


def show_verification(result: Verification) -> None:
    """Print the checks of a verification as a table."""
    marks = {True: "ok", False: "FAILED", None: "skipped"}
    table("", ["check", "result", "detail"], [[c.name, marks[c.passed], c.detail] for c in result.checks])
