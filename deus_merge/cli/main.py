"""The command ``deus-merge``: its subcommands, and the messages and exit codes of errors."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click
from click.shell_completion import CompletionItem

from .. import __version__
from ..core.errors import DeusMergeError, printable
from .messages import NoSuchCommand, show_error, usage_text

_COMMANDS = {  # name -> module with a click command of that name; imported when used, so that --help is fast
    "merge": "merge",
    "finish": "merge",
    "plan": "merge",
    "upscale": "merge",
    "verify": "inspect",
    "report": "inspect",
    "inspect": "inspect",
    "recipes": "recipes",
    "methods": "methods",
    "calibrate": "calibrate",
    "compare": "compare",
    "export-training": "training",
    "strip": "training",
    "demo": "demo",
    "env": "environment",
    "completion": "completion",
}
_HELP = {
    "merge": "Run a recipe and write the checkpoint.",
    "finish": "Put an output together from workers' pieces.",
    "plan": "Show what a recipe would do.",
    "upscale": "Make a model deeper, without a recipe file.",
    "verify": "Check a finished output.",
    "report": "Write an HTML page about a finished output.",
    "inspect": "Show a model's family, layers and sizes.",
    "calibrate": "Set zeroed outputs of new layers from a text.",
    "compare": "Compare inits, places, optimizers on your text.",
    "export-training": "Print a trainer's settings: only new layers train.",
    "strip": "Take the new layers out again.",
    "recipes": "List the recipes that ship with it, print one.",
    "methods": "List methods, solvers, families and presets.",
    "demo": "Up-scale a small real model, start to end.",
    "env": "Print what a bug report needs.",
    "completion": "Complete commands and values in your shell.",
}


class _PipeClosed(Exception):
    """The reader of the output closed the pipe. Of the error itself, click makes exit code 1."""


class _Lazy(click.Group):
    """A group that imports a command's module when the command is used."""

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        try:
            return super().make_context(*args, **more)
        except BrokenPipeError:
            raise _PipeClosed from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _PipeClosed from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        return getattr(importlib.import_module(f"{__package__}.{_COMMANDS[cmd_name]}"), cmd_name.replace("-", "_"))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            if args[0].startswith("-"):
                raise
            raise NoSuchCommand(args[0], _COMMANDS, ctx) from None

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands with their help, without an import of the commands."""
        found = [CompletionItem(name, help=text) for name, text in _HELP.items() if name.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_HELP.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="deus-merge")
def cli():
    """Deeper language models by optimal transport: merge, fuse and up-scale checkpoints from YAML recipes.

    \b
    deus-merge demo --tiny                              a small example, without a download
    deus-merge upscale ./model ./deeper                 make a model deeper
    deus-merge recipes                                  the recipes that ship with it
    deus-merge merge opt_deus ./out --model ./model     run a recipe: a file, or one that ships
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit; the arguments are those of the process unless given."""
    code = run_command(arguments)
    if code == 130:
        # Where the interrupt went through code that was given as a string, as a library may have it, Python ends
        # `python -m` by SIGINT after all, and not with this code. It forgets that when another string begins.
        exec("")
    sys.exit(code)


def run_command(arguments: list[str] | None) -> int:
    """Run the command line, and write all that it printed; a reader may stop to read (``| head``).

    Args, Returns: As `_run_command`.
    """
    code = _run_command(arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python ends
    return code


def _run_command(arguments: list[str] | None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments after the program's name; None for those of the process.

    Returns:
        The exit code: 0 success, 2 wrong input, 3 failed verification, 130 interrupted, 1 a bug or a failure of the
        machine.
    """
    # Waiting threads that spin slow a shared machine down several times. torch reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return cli(arguments, prog_name="deus-merge", standalone_mode=False) or 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # click 8.2 and newer
            error.show()
        else:
            show_error(usage_text(error))
        return 2
    except DeusMergeError as error:
        show_error(error)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as stop:
        click.echo(f"\ninterrupted{_notes(stop.__cause__ or stop)}", err=True)  # click wraps the interrupt
        return 130
    except _PipeClosed:
        return 0
    except OSError as error:  # the machine: a full disk, a lost mount
        place = f"{printable(error.filename)}: " if error.filename else ""
        show_error(f"{place}{error.strerror or error}{_notes(error)}")
        return 1


def _notes(error: BaseException) -> str:
    """The notes of an exception, which say how to continue."""
    return "".join(f"\n  {printable(note)}" for note in getattr(error, "__notes__", ()))
