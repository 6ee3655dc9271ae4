"""Errors and warnings for people: one style for ours and for those of click."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

import click

from ..core.errors import nearest, printable
from ..core.urls import redacted

_COLORS = {"error": "red", "warning": "yellow"}


class NoSuchCommand(click.UsageError):
    """No subcommand has this name."""

    def __init__(self, name: str, commands: Iterable[str], ctx: click.Context):
        super().__init__(f"no such command {name!r}", ctx)
        self.hint = nearest(name, commands)


def label(kind: str) -> str:
    """``error:`` or ``warning:``, in colour on a terminal unless ``NO_COLOR`` is set."""
    text = f"{kind}:"
    colored = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return click.style(text, fg=_COLORS[kind], bold=True) if colored else text


def show_error(text: object) -> None:
    """Print an error, whose control characters are escaped, on stderr."""
    click.echo(f"{label('error')} {redacted(str(text))}", err=True)


def usage_text(error: click.ClickException) -> str:
    """An error of click in the style of ours: the place, the problem, and what to do."""
    ctx = getattr(error, "ctx", None)
    message, hint = error.format_message(), None
    message = message[:1].lower() + message[1:]
    if isinstance(error, click.NoSuchOption):
        message = f"no such option {error.option_name}"
        hint = nearest(error.option_name, error.possibilities or ())
    elif isinstance(error, NoSuchCommand):
        hint = error.hint
    elif isinstance(error, click.BadParameter) and not isinstance(error, click.MissingParameter):
        place = error.param_hint or (error.param and ctx and error.param.get_error_hint(ctx))
        place = " / ".join(map(str, place)) if isinstance(place, list | tuple) else place
        message = f"{str(place).replace(chr(39), '')}: {error.message}" if place else error.message
    lines = [printable(message.strip().removesuffix("."))]
    if ctx is not None:
        lines.append(f"  usage:    {ctx.command_path} {' '.join(ctx.command.collect_usage_pieces(ctx))}")
        hint = hint or f"{ctx.command_path} --help"
    if hint:
        lines.append(f"  hint:     {hint}")
    return "\n".join(lines)
