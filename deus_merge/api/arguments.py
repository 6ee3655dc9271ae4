"""Checks of what callers pass: our errors in place of a TypeError from the depths."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoint.staging import check_local
from ..core.errors import DeusMergeError, RecipeError
from ..core.located import locate
from ..core.urls import is_url, public_url, split_url
from ..recipe.calibrate import read_text
from ..recipe.reader import parse_recipe, read_recipe, recipe_from
from ..recipe.types import Recipe

T = TypeVar("T")


def path_of(value: Any, name: str) -> Path:
    """A path.

    Raises:
        DeusMergeError: neither text nor a path, or an address without a bucket.
    """
    # of s3:///model, a Path would make the bucket `model`
    if isinstance(value, str) and is_url(value) and split_url(value).place[:1] in ("", "/"):
        raise DeusMergeError("no bucket in an address", where=name, expected="s3://bucket/model", got=public_url(value))
    if isinstance(value, str | os.PathLike) and str(value):
        return Path(value)
    raise DeusMergeError("not a path", where=name, expected="text or a Path", got=_shown(value))


def local_path_of(value: Any, name: str) -> Path:
    """A path of this machine.

    Raises:
        DeusMergeError: neither text nor a path, or an address like ``s3://bucket/model``.
    """
    path = path_of(value, name)
    check_local(path, "the folder", "download it, and name the folder that it is in then")
    return path


def model_of(value: Any, name: str = "model") -> str:
    """The name of a model.

    Raises:
        DeusMergeError: neither text nor a path.
    """
    if isinstance(value, str | os.PathLike):
        return str(value)
    raise DeusMergeError("not a model", where=name, expected="a folder or org/name[@revision]", got=_shown(value))


def name_of(value: Any) -> str:
    """The name of a method, a family ...

    Raises:
        DeusMergeError: not text.
    """
    if not isinstance(value, str):
        raise DeusMergeError("not a name", where="name", expected="text", got=_shown(value))
    return value


def instance(value: Any, kind: type[T], name: str) -> T:
    """The value, where it is of this type; a new one with its defaults for None.

    Raises:
        DeusMergeError: a value of another type.
    """
    if value is None:
        return kind()
    if not isinstance(value, kind):
        expected = f"deus_merge.{kind.__name__}(...)"
        raise DeusMergeError(f"not {kind.__name__}", where=name, expected=expected, got=_shown(value))
    return value


def recipe_of(value: Any) -> Recipe:
    """A recipe from whatever describes one: the recipe, its values, its YAML (text of several lines), or its file.

    Raises:
        RecipeError: it cannot be read, is invalid, or is something else.
    """
    if isinstance(value, Recipe):
        return value
    if isinstance(value, Mapping):
        return recipe_from(locate(dict(value)))
    if isinstance(value, str) and "\n" in value:
        return parse_recipe(value)
    if isinstance(value, str | os.PathLike):
        return read_recipe(str(value))
    raise RecipeError(
        "not a recipe", expected="a Recipe, its values as a dict, YAML of several lines, or a file", got=_shown(value)
    )


def text_of(value: Any, name: str = "text") -> str:
    """A text: the text itself, or the content of a file that a `Path` names.

    Raises:
        DeusMergeError: the file cannot be read, or the value is neither.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Path):
        return read_text(value, name)
    raise DeusMergeError("not a text", where=name, expected="the text, or the Path of its file", got=_shown(value))


def _shown(value: Any) -> str:
    """A value of the wrong type, for a message."""
    return type(value).__name__ if value is not None and value != "" else repr(value)
