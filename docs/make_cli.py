"""Generates docs/cli.md from ``--help``; a test checks that it is up to date. Run: python docs/make_cli.py"""

from __future__ import annotations

from pathlib import Path

import click

from deus_merge.cli.main import cli

PAGE = Path(__file__).parent / "cli.md"
_HEAD = """Generated from `--help` by `python docs/make_cli.py`.

Exit codes: 0 success, 2 the input is wrong, 3 the result failed verification, 130 interrupted (the message says how to
resume), 1 a bug or a failure of the machine (a full or failing disk, too little memory; finished blocks remain and the
run can be resumed).

`deus-merge completion --install` lets bash, zsh and fish complete commands, options, presets, methods, models (folders)
and recipes. `deus-merge env` prints what a bug report needs.

What a command is asked for goes to stdout, all else to stderr. Long commands show a bar on a terminal, which also moves
within a block; elsewhere they print a line every five seconds: how many steps have ended, the step, its own time and
the time so far. On a terminal, `error:` and `warning:` are in colour unless `NO_COLOR` is set. Tables are as wide as
the terminal, or `COLUMNS` characters."""


def render() -> str:
    """Every command's help, as Markdown."""
    lines = ["# Command line", "", _HEAD, ""]
    settings = {**cli.context_settings, "terminal_width": 100}
    root = click.Context(cli, info_name="deus-merge", **settings)
    lines += ["```", cli.get_help(root), "```", ""]
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=root, **settings)
        lines += [f"## deus-merge {name}", "", "```", command.get_help(context), "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
