"""`Recipe` -> YAML text that reads back as the same recipe."""

from __future__ import annotations

from pathlib import Path

import yaml

from ..checkpoint.hub import split_adapter
from ..core.units import dtype_name
from ..models.reference import ModelRef
from .parameters import Filtered, Gradient, Setting, Settings
from .types import OutputSlice, Recipe, SliceSource

Names = frozenset  # of documents: they are no folders


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, for any working directory: local models are named by absolute paths.

    Args:
        recipe: Usually a plan's, so with presets spelled out as slices.
    """
    names = frozenset(document.name for document in recipe.documents)
    return "---\n".join(_dump(_document(r, names)) for r in (*recipe.documents, recipe))


def _dump(data: dict) -> str:
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    if not text.replace("\n", "").isprintable():  # what would drive a terminal is written as escapes
        text = yaml.safe_dump(data, sort_keys=False, width=120, default_flow_style=None)
    return text


def _document(recipe: Recipe, names: Names) -> dict:
    data: dict[str, object] = {}
    if recipe.name:
        data["name"] = recipe.name
    if recipe.base_model:
        data["base_model"] = _model(recipe.base_model, names)
    for key in ("dtype", "out_dtype"):
        if code := getattr(recipe, key):
            data[key] = dtype_name(code)
    if recipe.tokenizer:
        data |= recipe.tokenizer.plain(lambda ref: _model(ref, names))
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
            name: _parameters(module.parameters) | {"slices": [_slice(piece, names) for piece in module.slices]}
            for name, module in recipe.modules.items()
        }
    else:
        data["slices"] = [_slice(piece, names) for piece in recipe.slices]
    return data


def _model(ref: ModelRef, names: Names) -> str:
    parts = [part for part in split_adapter(ref.text) if part is not None]
    local = [part for part in parts if part not in names and Path(part).exists()]
    return "+".join(str(Path(part).absolute()) if part in local else part for part in parts)


def _slice(piece: OutputSlice, names: Names) -> dict:
    data: dict[str, object] = {"merge_method": piece.merge_method}
    if piece.base_model:
        data["base_model"] = _model(piece.base_model, names)
    if piece.align:
        given = dict(piece.align.given)
        data["align"] = given if len(given) > 1 else given["alignment"]
    return data | _parameters(piece.parameters) | {"sources": [_source(s, names) for s in piece.sources]}


def _source(source: SliceSource, names: Names) -> dict:
    data: dict[str, object] = {"model": _model(source.model, names)}
    if source.layer_range:
        data["layer_range"] = list(source.layer_range)
    return data | _parameters(source.parameters)


def _parameters(settings: Settings) -> dict:
    return {"parameters": {name: _plain(value) for name, (value, _) in settings.items()}} if settings else {}


def _plain(setting: Setting) -> object:
    if isinstance(setting, Gradient):
        return list(setting.values)
    if isinstance(setting, Filtered):
        return [({"filter": f} if f is not None else {}) | {"value": _plain(v)} for f, v in setting.entries]
    return setting
