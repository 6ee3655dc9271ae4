"""Reads YAML as a `Recipe` and checks it as far as possible without opening a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from ..align.parameters import PARAMETERS
from ..checkpoint.hub import split_adapter
from ..core.errors import DeusMergeError, RecipeError, nearest
from ..core.located import Located, Plain
from ..core.text import plural
from ..core.units import dtype_code
from ..core.yaml_text import MAX_BYTES, parse_documents
from ..methods.registry import methods
from ..models.reference import ModelRef
from ..models.tokenizer.settings import read_tokenizer
from .calibrate import read_calibrate
from .documents import Document, in_order
from .mergekit import FORMS, ignored, top_level
from .parameters import Setting, Settings, check_setting, read_settings
from .references import read_model
from .types import Align, Module, OutputSlice, Recipe, SliceSource, Upscale

TOP = (
    "name", "slices", "models", "modules", "upscale", "merge_method", "base_model", "align", "parameters", "dtype",
    "out_dtype", "quantize_new", "calibrate", "tokenizer_source", "tokenizer", "chat_template",
)  # fmt: skip
_SLICE = ("sources", "merge_method", "base_model", "align", "parameters")
_SOURCE = ("model", "layer_range", "parameters")
_UPSCALE = ("preset", "insert", "parameters")
_MODULE = ("slices", "models", "parameters")
_NOT_WITH_UPSCALE = {
    "align": "the preset aligns new layers; set parameters: {alignment: ...} inside upscale",
    "merge_method": "choose a preset inside upscale, or write slices",
    "parameters": "write them inside upscale",
}


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: the file cannot be read or the recipe is invalid; with recipe path, line, expected and got.
    """
    try:
        with open(path, "rb") as file:
            text = recipe_text(file)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RecipeError(f"the recipe cannot be read: {reason}", where=path) from None
    return parse_recipe(text, str(path))


def recipe_text(file: BinaryIO) -> str:
    """The text of a recipe's file, as much as `parse_documents` needs to see that it is too large.

    Raises:
        UnicodeDecodeError: not UTF-8.
    """
    return file.read(MAX_BYTES + 1).decode("utf-8")


def parse_recipe(text: str, file: str = "recipe") -> Recipe:
    """Read a recipe's text; raises RecipeError as `read_recipe`."""
    return replace(recipe_of(parse_documents(text, file)), text=text)


def recipe_of(roots: Sequence[Located]) -> Recipe:
    """Read a recipe's documents; raises RecipeError as `read_recipe`."""
    recipes = [recipe_from(root) for root in roots]
    if len(recipes) == 1:
        return replace(recipes[0], name=None)
    uses = [{split_adapter(ref.text)[0]: ref.place for ref in recipe.models()} for recipe in recipes]
    order = in_order([Document(r.source, r.name, models) for r, models in zip(recipes, uses, strict=True)])
    *before, last = (recipes[i] for i in order)
    return replace(last, documents=tuple(before))


def recipe_from(root: Located) -> Recipe:
    """Read a recipe's values; raises RecipeError as `read_recipe`."""
    top = top_level(root, TOP)
    form = [key for key in FORMS if key in top]
    if len(form) != 1:
        root.fail(f"a recipe has exactly one of {', '.join(FORMS)}", got=", ".join(form) or "none of them")
    method = _method(top["merge_method"]) if "merge_method" in top else None
    base = read_model(top["base_model"]) if "base_model" in top else None
    align = _align(top["align"]) if "align" in top else None
    parameters = read_settings(top.get("parameters"))
    common = {
        "base_model": base,
        "parameters": parameters,
        "dtype": _dtype(top.get("dtype")),
        "out_dtype": _dtype(top.get("out_dtype")),
        "quantize_new": _boolean(top["quantize_new"]) if "quantize_new" in top else False,
        "calibrate": read_calibrate(top["calibrate"]) if "calibrate" in top else None,
        "tokenizer": read_tokenizer(top, read_model),
        "chat_template": _chat_template(top.get("chat_template")),
        "name": _name(top["name"]) if "name" in top else None,
        "source": root,
    }
    if form == ["upscale"]:
        if base is None:
            root.fail("upscale needs base_model", expected="base_model: a folder or org/name", got="no base_model")
        for key, hint in _NOT_WITH_UPSCALE.items():
            if key in top:
                top[key].fail(f"upscale and {key} exclude each other", hint=hint)
        recipe = Recipe(upscale=_upscale(top["upscale"]), **common)
        return replace(recipe, notes=tuple(ignored(recipe)))
    if form == ["modules"]:
        recipe = Recipe(modules=_modules(top["modules"], method, base, align), **common)
    else:
        recipe = Recipe(slices=_either(top, method, base, align), **common)
    _check_names(parameters, [s.merge_method for s in recipe.all_slices()])
    for module in recipe.modules.values():
        _check_names(module.parameters, [s.merge_method for s in module.slices])
    for part in recipe.all_slices():
        _check_names(part.parameters, [part.merge_method])
        for source in part.sources:  # mergekit ignores those of the whole slice
            lenient = not methods()[part.merge_method].inserts
            _check_names(source.parameters, [part.merge_method], "source", lenient=lenient)
    return replace(recipe, notes=tuple(ignored(recipe)))


def _modules(node: Located, method: str | None, base: ModelRef | None, align: Align | None) -> dict[str, Module]:
    """The ``modules:`` section, whose names are checked when the models are opened."""
    modules = {}
    for name, item in node.mapping(kind="a mapping of modules").items():
        keys = item.mapping(_MODULE, "a module")
        form = [key for key in ("slices", "models") if key in keys]
        if len(form) != 1:
            item.fail("a module has exactly one of slices and models", got=", ".join(form) or "neither")
        shared = read_settings(keys.get("parameters"))
        slices = tuple(replace(part, shared=shared) for part in _either(keys, method, base, align))
        modules[name] = Module(slices, shared, item)
    if not modules:
        node.fail("no module", expected="modules: {name: {slices: [...]}}")
    return modules


def _either(
    keys: Mapping[str, Located], method: str | None, base: ModelRef | None, align: Align | None
) -> tuple[OutputSlice, ...]:
    """The slices of a ``slices`` or a ``models`` section; the latter is one slice."""
    if "slices" in keys:
        return _slices(keys["slices"], method, align)
    return (_with_align(_models(keys["models"], method, base), align),)


def _slices(node: Located, method: str | None, align: Align | None) -> tuple[OutputSlice, ...]:
    return tuple(_with_align(_slice(item, method), align) for item in node.sequence("a list of slices"))


def _with_align(part: OutputSlice, align: Align | None) -> OutputSlice:
    """The slice with the recipe's ``align``, if it can have one and sets none itself."""
    takes = len(part.sources) > 1 and not methods()[part.merge_method].inserts
    return replace(part, align=align) if takes and part.align is None else part


def _slice(node: Located, method: str | None) -> OutputSlice:
    keys = node.mapping(_SLICE, "a slice")
    if "sources" not in keys:
        node.fail("a slice needs sources", expected="sources: [{model: ..., layer_range: [a, b]}]")
    name = _method(keys["merge_method"]) if "merge_method" in keys else method
    if name is None:
        node.fail("no merge_method", expected="merge_method in the slice or at the top level", got="neither")
    sources = tuple(_source(item) for item in keys["sources"].sequence("a list of sources"))
    first = sources[0]
    for source in sources[1:]:
        if first.layer_range and source.layer_range and source.num_layers != first.num_layers:
            source.place.child("layer_range").fail(
                "the sources of a slice must have the same number of layers",
                expected=f"{plural(first.num_layers or 0, 'layer')}, as in sources[0]",
                got=f"{plural(source.num_layers or 0, 'layer')}: {list(source.layer_range)}",
            )
    base = read_model(keys["base_model"]) if "base_model" in keys and keys["base_model"].value is not None else None
    align = _align(keys["align"]) if "align" in keys else None
    if align and methods()[name].inserts:
        align.place.fail(f"{name} has its own alignment", hint=f"parameters: {{alignment: {align.given['alignment']}}}")
    if align and len(sources) == 1:
        align.place.fail("align needs at least two sources", expected="a source to align, and one to align it to")
    return OutputSlice(sources, name, base, align, read_settings(keys.get("parameters")), node)


def _align(node: Located) -> Align:
    """An ``align`` section: the name of an alignment, or a mapping with ``alignment`` and its parameters."""
    names = [p.name for p in PARAMETERS]
    keys = node.mapping(names, "an align section") if isinstance(node.value, dict) else {"alignment": node}
    given: dict[str, Plain] = {}
    for parameter in PARAMETERS:
        if parameter.name in keys:
            place = keys[parameter.name]
            check_setting(parameter, Setting(place.plain(), place))
            given[parameter.name] = place.plain()
    values: dict[str, Any] = {p.name: p.read(given[p.name]) if p.name in given else p.default for p in PARAMETERS}
    return Align({"alignment": values["alignment"], **given}, values, node)


def _source(node: Located) -> SliceSource:
    keys = node.mapping(_SOURCE, "a source")
    if "model" not in keys:
        node.fail("a source needs a model", expected="model: a folder or org/name")
    layers = _layer_range(keys["layer_range"]) if "layer_range" in keys else None
    return SliceSource(read_model(keys["model"]), layers, read_settings(keys.get("parameters")), node)


def _models(node: Located, method: str | None, base: ModelRef | None) -> OutputSlice:
    """A ``models`` section: one slice of whole models."""
    if method is None:
        node.fail("no merge_method", expected="merge_method at the top level", got="none")
    sources = []
    for item in node.sequence("a list of models"):
        keys = item.mapping(("model", "parameters"), "an entry of models")
        if "model" not in keys:
            item.fail("an entry of models needs a model", expected="model: a folder or org/name")
        sources.append(SliceSource(read_model(keys["model"]), None, read_settings(keys.get("parameters")), item))
    if base and methods()[method].adds_base and base not in [s.model for s in sources]:
        sources.append(SliceSource(base, place=base.place))
    if len(sources) == 1 and methods()[method].copies_one:
        node.fail(f"{method} takes exactly two models, not 1", expected="another model, or base_model")
    return OutputSlice(tuple(sources), method, place=node)


def _name(node: Located) -> str:
    text = node.string("a name for other documents to use")
    if "+" in text or "@" in text:
        node.fail("not a valid name of a document", expected="no + and no @, which have a meaning in model references")
    return text


def _layer_range(node: Located) -> tuple[int, int]:
    items = node.sequence("a layer_range", "[first, last + 1]")
    if len(items) != 2:
        node.fail("a layer_range has two numbers", expected="[first, last + 1]")
    start, end = (item.integer() for item in items)
    if start > end:
        node.fail(
            "reversed layer_range",
            expected="[first, last + 1] with first <= last",
            hint=f"did you mean [{end}, {start}]?",
        )
    return start, end


def _method(node: Located) -> str:
    return node.choice(methods(), "merge method")


def _chat_template(node: Located | None) -> str | None:
    return None if node is None else node.string("auto, the name of a template, or a Jinja template")


def _dtype(node: Located | None) -> str | None:
    if node is None:
        return None
    try:
        return dtype_code(node.string("a dtype"))
    except DeusMergeError as error:
        node.fail(error.message, expected=error.expected, hint=error.hint)


def _boolean(node: Located) -> bool:
    if not isinstance(node.value, bool):
        node.fail("not a yes or no", expected="true or false")
    return node.value


def _upscale(node: Located) -> Upscale:
    keys = node.mapping(_UPSCALE, "an upscale section")
    preset = keys["preset"].string("the name of a preset") if "preset" in keys else "opt_deus"
    return Upscale(preset, keys.get("insert"), read_settings(keys.get("parameters")), node)


def _check_names(settings: Settings, names: list[str], scope: str | None = None, lenient: bool = False) -> None:
    """Raise a RecipeError unless every setting is a valid value of a parameter of one of the methods it applies to.

    Args:
        settings: The settings.
        names: The methods.
        scope: The only scope that their parameters may have; None for any.
        lenient: Whether parameters of other scopes are accepted, too, although they have no effect.
    """
    for name, setting in settings.items():
        of_name = [p for m in names for p in methods()[m].parameters if p.name == name]
        known = [p for p in of_name if lenient or scope in (None, p.scope)]
        if not known:
            every = {p.name: p for m in names for p in methods()[m].parameters}
            here = sorted(n for n, p in every.items() if scope in (None, p.scope))
            setting.place.fail(
                f"{', '.join(dict.fromkeys(names))} has no parameter {name!r}{' of a source' if scope else ''}",
                expected=", ".join(here) or "no parameters here",
                got=name,
                hint=f"{name} is a parameter of the whole slice" if name in every else nearest(name, here),
            )
        for parameter in known:
            check_setting(parameter, setting)
