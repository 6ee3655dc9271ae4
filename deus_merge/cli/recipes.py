"""``recipes``: the recipes that ship with the package. And where ``merge`` and ``plan`` get theirs from."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from ..core.errors import RecipeError, nearest
from ..core.yaml_text import parse_documents
from ..recipe.overrides import changed_text, with_models, with_values
from ..recipe.reader import recipe_of, recipe_text
from ..recipe.shipped import recipe_names, shipped
from ..recipe.types import Recipe
from .completion import complete_models, complete_shipped
from .output import emit_json, note, table


def recipe_options(command: Callable) -> Callable:
    """Add the options that change a recipe."""
    model = click.option(
        "--model", "models", multiple=True, metavar="[OLD=]NEW", shell_complete=complete_models,
        help="Another model in place of the recipe's; of several models, OLD is the one.",
    )  # fmt: skip
    setting = click.option(
        "--set", "settings", multiple=True, metavar="PATH=VALUE",
        help="Another value in the recipe, like upscale.insert=all or slices.0.parameters.t=0.3.",
    )  # fmt: skip
    return model(setting(command))


def load_recipe(source: Path, models: tuple[str, ...], settings: tuple[str, ...], quiet: bool = False) -> Recipe:
    """Read a recipe as it is named on the command line.

    Args:
        source: A file, ``-`` for stdin, or the name of a recipe that ships, where no such file exists.
        models, settings: The values of ``--model`` and ``--set``.
        quiet: Whether it is not said that the recipe is one that ships.

    Raises:
        RecipeError: it cannot be read, or is invalid.
    """
    name = str(source)
    try:
        if name == "-":
            name = "stdin"
            text = recipe_text(sys.stdin.buffer)
        elif not source.exists() and name in recipe_names():
            text = shipped()[name].text
            note(f"recipe {name}, which ships with deus-merge", quiet)
        else:
            with source.open("rb") as file:
                text = recipe_text(file)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        missing = isinstance(error, FileNotFoundError)
        raise RecipeError(
            f"the recipe cannot be read: {reason}", where=name, hint=_hint(source) if missing else None
        ) from None
    recipe = recipe_of(with_values(with_models(parse_documents(text, name), models), settings))
    return replace(recipe, text=changed_text(text, models, settings))


def _hint(missing: Path) -> str:
    """What to do about a recipe that does not exist."""
    if missing.stem in recipe_names():
        return f"{missing.stem!r} without a folder and a suffix is the one that ships with deus-merge"
    return nearest(missing.stem, recipe_names()) or "deus-merge recipes lists those that ship with deus-merge"


@click.command()
@click.argument("name", required=False, shell_complete=complete_shipped)
@click.option("--schema", is_flag=True, help="Print the JSON Schema of recipes, for editors.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON on stdout.")
def recipes(name: str | None, schema: bool, as_json: bool):
    """List the recipes that ship with deus-merge; with NAME, print one. `merge` and `plan` take these names, too.

    \b
    Example:
      deus-merge recipes opt_deus > my.yml
    """
    if schema:
        from ..recipe.schema import recipe_schema

        if name is not None:
            raise click.UsageError("--schema is that of every recipe: leave NAME out")
        emit_json(recipe_schema())
        return
    entries = shipped()
    if name is not None:
        if name not in entries:
            raise RecipeError(
                f"no recipe {name!r} ships with deus-merge",
                expected="a name that deus-merge recipes lists",
                hint=nearest(name, entries, 3),
            )
        emit_json({"name": name, "text": entries[name].text}) if as_json else click.echo(entries[name].text, nl=False)
        return
    if as_json:
        emit_json({entry.name: entry.summary for entry in entries.values()})
        return
    table("", ["recipe", "description"], [[entry.name, entry.summary] for entry in entries.values()])
