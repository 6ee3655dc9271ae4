"""The files beside the weights: generation config, tokenizer, chat template, licence."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from .checkpoint.header import parse_json, read_small
from .checkpoint.hub import resolve
from .errors import CheckpointError, RecipeError, json_text, nearest
from .recipe import Recipe

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_DONOR_FILES = ("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")


def extra_files(recipe: Recipe, models: Mapping[str, Path], donor: Path) -> dict[str, bytes | Path]:
    """What to put beside the weights.

    Args:
        recipe: Its ``tokenizer_source`` and ``chat_template`` are followed.
        models: Folder of each model the recipe names.
        donor: The folder of the model that gives everything else.

    Returns:
        File name -> its bytes, or a file to copy.

    Raises:
        RecipeError: a tokenizer source that is none of the models, or a chat template that is none.
        CheckpointError: a link that leads out of a model's folder.
    """
    # A model's code is copied as any other file; nothing here runs it.
    code = sorted(p.name for p in donor.glob("*.py")) if b'"auto_map"' in read_small(donor / "config.json") else []
    files: dict[str, bytes | Path] = dict(_present(donor, code, by_name=False))
    files |= _present(donor, _DONOR_FILES)
    files |= _present(_tokenizer_folder(recipe, models, donor), TOKENIZER_FILES)
    if recipe.chat_template not in (None, "auto"):
        _set_chat_template(files, recipe)
    return dict(sorted(files.items()))


def _present(folder: Path, names: Iterable[str], by_name: bool = True) -> dict[str, Path]:
    found = {name: folder / name for name in names if os.path.lexists(folder / name) and not (folder / name).is_dir()}
    for path in found.values():
        _check_link(path, folder, by_name)
    return found


def _check_link(path: Path, folder: Path, by_name: bool) -> None:
    """These files go into the output as they are, so no link may fetch somebody's private files into it.

    A link may lead to a place in the folder, to the blobs of its repository in the hub's cache, or (``by_name``, for
    names that we choose) to a file of the same name. Weights and config.json may be links to anywhere: they are parsed.

    Raises:
        CheckpointError: it leads elsewhere.
    """
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    homes = {home, home.parent.parent / "blobs"} if home.parent.name == "snapshots" else {home}
    if not homes & set(real.parents) and not (by_name and real.name == path.name):
        raise CheckpointError(
            "a link leads out of the model's folder",
            where=path,
            expected="a file, since it is copied into the output",
            got=f"a link to {real}",
            hint="put a copy of the file in its place, if you want it to be part of the output: cp -L",
        )


def _tokenizer_folder(recipe: Recipe, models: Mapping[str, Path], donor: Path) -> Path:
    source = recipe.tokenizer_source
    if source in (None, "base"):
        return donor
    node = recipe.source.value["tokenizer_source"]
    if source == "union":
        node.fail("union is not supported by this version", expected=f"base, or one of the models: {', '.join(models)}")
    if source not in models:
        node.fail(
            "the tokenizer is none of the recipe's models",
            expected=f"base, or one of: {', '.join(models)}",
            hint=nearest(source, models),
        )
    return resolve(source)


def _set_chat_template(files: dict[str, bytes | Path], recipe: Recipe) -> None:
    """The recipe's template replaces every other the tokenizer may carry."""
    template = recipe.chat_template
    if "{{" not in template and "{%" not in template:
        node = recipe.source.value["chat_template"]
        raise RecipeError(
            "not a chat template",
            where=node.where,
            expected="auto, or a Jinja template",
            got=node.shown(),
            hint="templates are not known by name: write the template itself",
        )
    files.pop("chat_template.json", None)
    try:
        files["chat_template.jinja"] = template.encode()
    except UnicodeEncodeError:
        recipe.source.value["chat_template"].fail("half a character (a lone surrogate)", expected="text")
    config = files.get("tokenizer_config.json")
    if isinstance(config, Path):
        data = parse_json(read_small(config), config, "tokenizer's config")
        data.pop("chat_template", None)
        files["tokenizer_config.json"] = (json_text(data, indent=2) + "\n").encode()
