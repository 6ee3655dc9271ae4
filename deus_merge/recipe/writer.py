"""Writes a `Recipe` as YAML text that reads back as the same recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from ..checkpoint.hub import split_adapter
from ..core.located import Plain
from ..core.units import dtype_name
from ..core.urls import redacted
from ..models.reference import ModelRef
from .parameters import Filtered, Gradient, Settings, Value
from .types import OutputSlice, Recipe, SliceSource

_Names = frozenset[str]  # names of documents, which are not folders
_Place = Callable[[str], str]  # a local path -> how the text gives it


def absolute_path(path: str) -> str:
    """A path as it is valid in any working directory of this machine."""
    return str(Path(path).absolute())


def dump_recipe(recipe: Recipe, place: _Place = absolute_path) -> str:
    """The recipe as YAML that reads back as the same recipe.

    Args:
        recipe: A recipe; usually a plan's, in which presets are expanded to slices.
        place: How a local path is written; by default absolute, so that the text is valid in any working directory.
    """
    names = frozenset(document.name for document in recipe.documents if document.name)
    return "---\n".join(_dump(_document(r, names, place)) for r in (*recipe.documents, recipe))


def as_written(recipe: Recipe) -> str:
    """The recipe as its user wrote it: its text, or the values that it was made from as YAML. Addresses have neither
    passwords nor queries.

    Args:
        recipe: A recipe; of a plan's, presets are as they were before they were expanded.
    """
    if recipe.text is not None:
        return redacted(recipe.text)
    if recipe.source.value is None:  # made in Python, of its classes
        return dump_recipe(recipe)
    return redacted("---\n".join(_dump(r.source.plain()) for r in (*recipe.documents, recipe)))


def _dump(data: Plain) -> str:
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    if not text.replace("\n", "").isprintable():  # escape characters that would control a terminal
        text = yaml.safe_dump(data, sort_keys=False, width=120, default_flow_style=None)
    return text


def _document(recipe: Recipe, names: _Names, place: _Place) -> dict:
    data: dict[str, object] = {}
    if recipe.name:
        data["name"] = recipe.name
    if recipe.base_model:
        data["base_model"] = _model(recipe.base_model, names, place)
    for key in ("dtype", "out_dtype"):
        if code := getattr(recipe, key):
            data[key] = dtype_name(code)
    if recipe.quantize_new:
        data["quantize_new"] = True
    if how := recipe.calibrate:
        data["calibrate"] = {"text": place(how.text), **how.settings}
    if recipe.tokenizer:
        data |= recipe.tokenizer.plain(lambda ref: _text(ref, names, place))
    if recipe.chat_template:
        data["chat_template"] = recipe.chat_template
    data |= _parameters(recipe.parameters)
    if recipe.upscale:
        section = {"preset": recipe.upscale.preset} | _parameters(recipe.upscale.parameters)
        if recipe.upscale.insert:
            section["insert"] = recipe.upscale.insert.plain()
        data["upscale"] = section
    elif recipe.modules:
        data["modules"] = {
            name: _parameters(module.parameters) | {"slices": [_slice(part, names, place) for part in module.slices]}
            for name, module in recipe.modules.items()
        }
    else:
        data["slices"] = [_slice(part, names, place) for part in recipe.slices]
    return data


def _model(ref: ModelRef, names: _Names, place: _Place) -> Plain:
    """A reference in the form of a recipe."""
    text = _text(ref, names, place)
    return {"model": text, "override_architecture": ref.architecture} if ref.architecture else text


def _text(ref: ModelRef, names: _Names, place: _Place) -> str:
    parts = [part for part in split_adapter(ref.text) if part is not None]
    local = [part for part in parts if part not in names and Path(part).exists()]
    return "+".join(place(part) if part in local else part for part in parts)


def _slice(part: OutputSlice, names: _Names, place: _Place) -> dict:
    data: dict[str, object] = {"merge_method": part.merge_method}
    if part.base_model:
        data["base_model"] = _model(part.base_model, names, place)
    if part.align:
        given = dict(part.align.given)
        data["align"] = given if len(given) > 1 else given["alignment"]
    return data | _parameters(part.parameters) | {"sources": [_source(s, names, place) for s in part.sources]}


def _source(source: SliceSource, names: _Names, place: _Place) -> dict:
    data: dict[str, object] = {"model": _model(source.model, names, place)}
    if source.layer_range:
        data["layer_range"] = list(source.layer_range)
    return data | _parameters(source.parameters)


def _parameters(settings: Settings) -> dict:
    return {"parameters": {name: _plain(setting.value) for name, setting in settings.items()}} if settings else {}


def _plain(value: Value) -> Plain:
    if isinstance(value, Gradient):
        return list(value.values)
    if isinstance(value, Filtered):
        return [{**({"filter": f} if f is not None else {}), "value": _plain(v)} for f, v in value.entries]
    return value
