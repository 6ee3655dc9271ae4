"""``completion``: installs the completion of commands, options and values in a shell. And the values of the options.

The protocol is click's: the shell calls the command with ``_DEUS_MERGE_COMPLETE`` set, and gets a line for each value.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from ..core.errors import DeusMergeError
from .output import note

SHELLS = ("bash", "zsh", "fish")
_VARIABLE = "_DEUS_MERGE_COMPLETE"
# a .zshrc may have no completion at all
_ZSH_START = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }\n"

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


@click.command()
@click.argument("shell", type=click.Choice(SHELLS), required=False)
@click.option("--install", is_flag=True, help="Install it for this user in place of printing it.")
def completion(shell: str | None, install: bool):
    """Print the script that lets SHELL complete commands, options, presets, methods, models and recipes.

    With --install it is put where the shell finds it. SHELL is by default the one that the variable SHELL names.

    \b
    Example:
      deus-merge completion --install
    """
    name = shell or Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        raise DeusMergeError(
            "which shell this is cannot be seen", where="SHELL", expected=" | ".join(SHELLS), got=name or "nothing",
            hint="name it: deus-merge completion bash --install",
        )  # fmt: skip
    text = _script(name)
    if not install:
        click.echo(text, nl=False)
        return
    try:
        for path in _install(name, text):
            note(f"written: {path}")
    except OSError as error:
        raise DeusMergeError("cannot be written", where=error.filename, got=error.strerror) from None
    note("it works in every new shell")


def _script(shell: str) -> str:
    """The script for a shell."""
    from .main import cli

    kind = get_completion_class(shell)
    assert kind is not None
    text = kind(cli, {}, "deus-merge", _VARIABLE).source()
    return (_ZSH_START if shell == "zsh" else "") + text.strip("\n") + "\n"


def _install(shell: str, text: str) -> list[Path]:
    """Write the script, and let the shell read it when it starts.

    Returns:
        The files that have changed.
    """
    home = Path.home()
    if shell == "fish":  # reads everything in this folder
        path = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "fish/completions/deus-merge.fish"
        start = None
    else:
        path = Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share") / f"deus-merge/completion.{shell}"
        start = home / ".bashrc" if shell == "bash" else Path(os.environ.get("ZDOTDIR") or home) / ".zshrc"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    if start is None:
        return [path]
    line = f"source {shlex.quote(str(path))}"
    before = start.read_text(encoding="utf-8", errors="surrogateescape") if start.exists() else ""
    if line in before.splitlines():
        return [path]
    with start.open("a", encoding="utf-8") as file:
        file.write(f"{'' if not before or before.endswith(chr(10)) else chr(10)}{line}\n")
    return [path, start]


# values of arguments and options ----------------------------------------------------------------------------------


def _items(values: Iterable[str] | Mapping[str, str], incomplete: str) -> list[CompletionItem]:
    """The values that begin like this; of a mapping, with their descriptions."""
    described = values if isinstance(values, Mapping) else dict.fromkeys(values)
    return [CompletionItem(name, help=text) for name, text in described.items() if name.startswith(incomplete)]


def words(*values: str) -> Complete:
    """Completes fixed words."""
    return lambda ctx, param, incomplete: _items(values, incomplete)


def complete_models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Folders, for the shell to list; of files only GGUF's, which are models too."""
    folder, name = os.path.split(incomplete)
    try:
        found = sorted(path for path in Path(folder or ".").glob("*.gguf") if path.name.startswith(name))
    except (OSError, ValueError):
        found = []
    if found and name:
        return _items([os.path.join(folder, path.name) for path in found], incomplete)
    return [CompletionItem(incomplete, type="dir")]


def complete_presets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Presets of ``upscale``."""
    from ..recipe.presets import PRESETS

    return _items({name: preset.summary for name, preset in PRESETS.items()}, incomplete)


def complete_inits(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """How new layers begin in a comparison."""
    from ..training.comparison.candidates import RANDOM

    return [*complete_presets(ctx, param, incomplete), *_items({RANDOM: "random weights, zero outputs"}, incomplete)]


def complete_methods(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Everything that ``methods`` lists."""
    from ..recipe.catalog import catalog

    return _items({n: entry["summary"] for kind in catalog().values() for n, entry in kind.items()}, incomplete)


def complete_shipped(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The recipes, scripts and notebooks that ship."""
    from ..recipe.shipped import shipped

    return _items({name: entry.summary for name, entry in shipped().items()}, incomplete)


def complete_recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """YAML files, and the recipes that ship; where there are none, files and folders, which the shell lists."""
    from ..recipe.shipped import recipe_names, shipped

    folder, name = os.path.split(incomplete)
    try:
        files = [p.name for p in sorted(Path(folder or ".").glob("*.y*ml")) if p.name.startswith(name)]
    except (OSError, ValueError):
        files = []
    found = _items([os.path.join(folder, file) for file in files], incomplete)
    found += _items({name: shipped()[name].summary for name in recipe_names()}, incomplete)
    return found or [CompletionItem(incomplete, type="file")]


def complete_dtypes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Dtypes of an output."""
    from ..core.units import FLOAT_DTYPES

    return _items(FLOAT_DTYPES.keys(), incomplete)


complete_devices = words("auto", "cpu", "cuda")
complete_inserts = words("even", "top_half", "bottom_half", "all")
