"""`Recipe` -> YAML text that reads back as the same recipe."""

from __future__ import annotations

from pathlib import Path

import yaml

from .recipe import ModelRef, OutputSlice, Recipe, SliceSource
from .settings import Filtered, Gradient, Setting, Settings
from .units import dtype_name


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, for any working directory: local models are named by absolute paths.

    Args:
        recipe: Usually a plan's, so with presets spelled out as slices.
    """
    data: dict[str, object] = {}
    if recipe.base_model:
        data["base_model"] = _model(recipe.base_model)
    for key in ("dtype", "out_dtype"):
        if code := getattr(recipe, key):
            data[key] = dtype_name(code)
    if source := recipe.tokenizer_source:
        data["tokenizer_source"] = source if source == "base" else _model(ModelRef(source))
    if recipe.chat_template:
        data["chat_template"] = recipe.chat_template
    data |= _parameters(recipe.parameters)
    if recipe.upscale:
        section = {"preset": recipe.upscale.preset} | _parameters(recipe.upscale.parameters)
        if recipe.upscale.insert:
            section["insert"] = recipe.upscale.insert.plain()
        data["upscale"] = section
    else:
        data["slices"] = [_slice(piece) for piece in recipe.slices]
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    if not text.replace("\n", "").isprintable():  # what would drive a terminal is written as escapes
        text = yaml.safe_dump(data, sort_keys=False, width=120, default_flow_style=None)
    return text


def _model(ref: ModelRef) -> str:
    return str(Path(ref.text).absolute()) if Path(ref.text).exists() else ref.text


def _slice(piece: OutputSlice) -> dict:
    data: dict[str, object] = {"merge_method": piece.merge_method}
    if piece.base_model:
        data["base_model"] = _model(piece.base_model)
    if piece.align:
        given = dict(piece.align.given)
        data["align"] = given if len(given) > 1 else given["alignment"]
    return data | _parameters(piece.parameters) | {"sources": [_source(s) for s in piece.sources]}


def _source(source: SliceSource) -> dict:
    data: dict[str, object] = {"model": _model(source.model)}
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
