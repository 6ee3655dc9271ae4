"""The files beside the weights: generation config, tokenizer, chat template, licence."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from .checkpoint.header import parse_json, read_small
from .checkpoint.reader import TensorSource
from .errors import CheckpointError, RecipeError, json_text, nearest
from .recipe import Recipe

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_DONOR_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "normalizer.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md",
)  # fmt: skip


def extra_files(recipe: Recipe, models: Mapping[str, TensorSource], donor: TensorSource) -> dict[str, bytes | Path]:
    """What to put beside the weights.

    Args:
        recipe: Its ``tokenizer_source`` and ``chat_template`` are followed.
        models: Each model the recipe names.
        donor: The model that gives everything else.

    Returns:
        File name -> its bytes, or a file to copy.

    Raises:
        RecipeError: a tokenizer source that is none of the models, or a chat template that is none.
        CheckpointError: a link that leads out of a model's folder.
    """
    files = dict(_own_files(donor))
    files |= _present(_tokenizer(recipe, models, donor), TOKENIZER_FILES)
    if recipe.chat_template not in (None, "auto"):
        _set_chat_template(files, recipe)
    return dict(sorted(files.items()))


def copied_files(source: TensorSource) -> dict[str, bytes | Path]:
    """Everything beside a model's weights and config that belongs to it: name -> bytes, or a file to copy."""
    return dict(sorted((_own_files(source) | _present(source, TOKENIZER_FILES)).items()))


def _own_files(source: TensorSource) -> dict[str, bytes | Path]:
    """What comes from no other model than the weights do: its code (copied, never run), generation config, licence."""
    code = [n for n in source.beside if n.endswith(".py")] if '"auto_map"' in json.dumps(source.config) else []
    return _present(source, (*code, *_DONOR_FILES))


def _present(source: TensorSource, names: Sequence[str]) -> dict[str, bytes | Path]:
    beside = source.beside
    found = {name: beside[name] for name in names if name in beside}
    for path in found.values():
        if isinstance(path, Path):
            _check_link(path)
    return found


def _check_link(path: Path) -> None:
    """These files go into the output as they are, so no link may fetch somebody's private files into it.

    A link may lead to a place in the folder, to the blobs of its repository in the hub's cache, or to a file of the
    same name (but for code, whose names are the model's own). Weights and config.json may be links to anywhere: they
    are parsed.

    Raises:
        CheckpointError: it leads elsewhere.
    """
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    homes = {home, home.parent.parent / "blobs"} if home.parent.name == "snapshots" else {home}
    if not homes & set(real.parents) and (real.name != path.name or path.suffix == ".py"):
        raise CheckpointError(
            "a link leads out of the model's folder",
            where=path,
            expected="a file, since it is copied into the output",
            got=f"a link to {real}",
            hint="put a copy of the file in its place, if you want it to be part of the output: cp -L",
        )


def _tokenizer(recipe: Recipe, models: Mapping[str, TensorSource], donor: TensorSource) -> TensorSource:
    """The model whose tokenizer the output takes."""
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
    return models[source]


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
    if config is not None:
        raw, where = (
            (config, Path("tokenizer_config.json")) if isinstance(config, bytes) else (read_small(config), config)
        )
        data = parse_json(raw, where, "tokenizer's config")
        data.pop("chat_template", None)
        files["tokenizer_config.json"] = (json_text(data, indent=2) + "\n").encode()
