"""The JSON Schema of recipes (draft 7, which editors know), made from what the reader knows.

Every recipe that the reader accepts is valid. The other way round, only the models, or the order of numbers, can tell
that some valid documents are wrong; and of other keys than those that begin with ``x-`` or ``.``, the schema cannot see
that they hold anchors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..align.options import ALIGNMENTS
from ..align.parameters import PARAMETERS
from ..core.parameters import Parameter
from ..core.units import FLOAT_DTYPES
from ..methods.base import MergeMethod
from ..methods.registry import methods
from .calibrate import METHODS
from .mergekit import FORMS, OPTIONAL, PREFIXES
from .presets import PRESETS
from .reader import TOP
from .schema_values import Schema, mapping, number, optional, plain, setting, text, whole_number

_WHERE = {"enum": ["top", "middle", "bottom", "even", "sandwich"]}
_BLOCKS = {"enum": ["top", "middle", "bottom"]}
_METHOD = "How the sources are merged; deus-merge methods lists the methods."


def recipe_schema() -> Schema:
    """The JSON Schema of one document of a recipe."""
    every = methods()
    names = _parameter_names(every.values())
    definitions: dict[str, Schema] = {
        "model": _model(),
        "layer_range": {
            "description": "[first layer, last layer + 1]",
            "type": "array",
            "items": whole_number(),
            "minItems": 2,
            "maxItems": 2,
        },
        "align": _align(),
        "source": mapping({"model": _ref("model"), "layer_range": _ref("layer_range"), "parameters": {}}, ["model"]),
        "slice": _slice(every),
        "whole model": mapping({"model": _ref("model"), "parameters": {}}, ["model"]),
        "parameters": _parameters(names, every.values()),
    }
    for (_, _, name), parameter in names.items():
        definitions[name] = setting(parameter, f"#/definitions/{name}")
    for name, method in every.items():
        own = [p for p in method.parameters if p.scope == "source" or not method.inserts]
        definitions[f"{name}: parameters"] = _parameters(names, [method])
        definitions[f"{name}: parameters of a source"] = _parameters(names, [method], own)
        definitions[f"{name}: slice"] = _with_method(name)
        definitions[f"{name}: recipe"] = _by_default(name)
    properties = _properties()
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "deus-merge recipe",
        "description": "Generated from the code by docs/make_recipe_schema.py; docs/recipes.md explains it.",
        **mapping({key: optional(s) if key in OPTIONAL - {"parameters"} else s for key, s in properties.items()}),
        "patternProperties": {f"^{prefix.replace('.', chr(92) + '.')}": {} for prefix in PREFIXES},
        "allOf": [*_rules(), *(_when("merge_method", name, _ref(f"{name}: recipe")) for name in every)],
        "definitions": dict(sorted(definitions.items())),
    }


def _properties() -> dict[str, Schema]:
    """The keys of a recipe. One that is not described here may have any value."""
    dtypes = {"enum": [*FLOAT_DTYPES, *(f"torch.{name}" for name in FLOAT_DTYPES)]}
    known: dict[str, Schema] = {
        "name": {
            "type": "string",
            "pattern": r"^[^+@]*[^+@\s][^+@]*$",
            "description": "The document's name in others.",
        },
        **_layers(),
        "modules": {
            "description": "Modules of a model with several stacks of layers, by name.",
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {
                **mapping({**_layers(), "parameters": _ref("parameters")}),
                "oneOf": [{"required": ["slices"]}, {"required": ["models"]}],
            },
        },
        "upscale": _upscale(),
        "merge_method": {"enum": sorted(methods()), "description": _METHOD},
        "base_model": _ref("model"),
        "align": _ref("align"),
        "parameters": _ref("parameters"),
        "dtype": {**dtypes, "description": "Of the arithmetic and of the output; the models' own without it."},
        "out_dtype": {**dtypes, "description": "Of the output, where it is another one than dtype."},
        "quantize_new": {"type": "boolean", "description": "New layers in the format of a quantised base."},
        "calibrate": _calibrate(),
        "tokenizer_source": {
            "anyOf": [{"enum": ["union", "base"]}, _ref("model")],
            "description": "Where the output's tokenizer comes from.",
        },
        "tokenizer": _tokenizer(),
        "chat_template": text("auto, the name of a template, or a Jinja template"),
    }
    return {key: known.get(key, {}) for key in TOP}


def _layers() -> Schema:
    """The keys that say which layers the output has."""
    slices = _list(_ref("slice"), "The layers of the output, from the bottom.")
    return {"slices": slices, "models": _list(_ref("whole model"), "Whole models to merge.")}


def _rules() -> list[Schema]:
    """What keys need and exclude each other."""
    given = {key: {"properties": {key: {"not": {"type": "null"}}}, "required": [key]} for key in (*FORMS, "base_model")}
    tokenizers = ["tokenizer", "tokenizer_source"]
    values = {"properties": {key: {"not": {"type": "null"}} for key in tokenizers}, "required": tokenizers}
    own_method = {"properties": {"slices": {"items": {"required": ["merge_method"]}}}}
    alone = {"properties": {"align": False, "merge_method": False, "parameters": {"type": "null"}}}
    return [
        {"oneOf": [given[form] for form in FORMS]},
        {"if": given["models"], "then": {"required": ["merge_method"]}},
        {"if": given["slices"], "then": {"anyOf": [{"required": ["merge_method"]}, own_method]}},
        {"if": given["upscale"], "then": {"allOf": [given["base_model"], alone]}},
        {"not": values},
    ]


def _model() -> Schema:
    """A reference to a model."""
    path = mapping({"path": text(), "revision": optional(text())}, ["path"])
    name = text("a folder or org/name[@revision], and perhaps +adapter")
    inner = {"anyOf": [name, path, _ref("model")]}
    with_adapter = mapping(
        {"model": inner, "lora": optional(inner), "override_architecture": optional(text())}, ["model"]
    )
    return {"anyOf": [name, path, with_adapter]}


def _align() -> Schema:
    return {
        "description": "Sources are aligned to the base model (or to the last source) before they are merged.",
        "anyOf": [
            {"enum": list(ALIGNMENTS)},
            {"type": "object", "properties": {p.name: plain(p) for p in PARAMETERS}, "additionalProperties": False},
        ],
    }


def _slice(every: Iterable[str]) -> Schema:
    sources = _list(_ref("source"), "The layers that are merged, of one or more models.")
    keys = {
        "sources": sources,
        "merge_method": {"enum": sorted(every), "description": _METHOD},
        "base_model": optional(_ref("model")),
        "align": _ref("align"),
        "parameters": _ref("parameters"),
    }
    rules = [_when("merge_method", name, _ref(f"{name}: slice")) for name in every]
    return mapping(keys, ["sources"], allOf=rules)


def _with_method(name: str) -> Schema:
    """What a slice of a method has."""
    return {"properties": {"parameters": _ref(f"{name}: parameters"), "sources": {"items": _of_source(name)}}}


def _by_default(name: str) -> Schema:
    """What a recipe has whose ``merge_method`` is this one: its slices, unless they set another one."""
    own = {"required": ["merge_method"]}
    slices = {"items": {"if": {"not": own}, "then": _ref(f"{name}: slice")}}
    parts = {"slices": slices, "models": {"items": _of_source(name)}}
    alone = {"not": {"required": ["modules"]}, "properties": {"slices": {"items": {"not": own}}}}
    return {
        "properties": {**parts, "modules": {"additionalProperties": {"properties": parts}}},
        "if": alone,
        "then": {"properties": {"parameters": _ref(f"{name}: parameters")}},
    }


def _of_source(name: str) -> Schema:
    return {"properties": {"parameters": _ref(f"{name}: parameters of a source")}}


def _upscale() -> Schema:
    """The ``upscale:`` section."""
    places = [
        {"enum": ["even", "top_half", "bottom_half", "all"]},
        mapping({"every": whole_number(1)}, ["every"]),
        mapping({"after": {"type": "array", "items": whole_number(), "minItems": 1}}, ["after"]),
        mapping({"count": whole_number(1), "where": _WHERE}, ["count"]),
    ]
    keys = {
        "preset": {
            "enum": list(PRESETS),
            "description": "The kind of new layers; deus-merge methods lists the presets.",
        },
        "insert": {"description": "The places of new layers.", "anyOf": places},
        "parameters": {"description": "Parameters of the preset's method."},
    }
    rules = []
    for name, preset in PRESETS.items():
        if preset.parameters is None:
            where = {} if name == "solar" else {"where": _BLOCKS}
            counted = mapping({"count": whole_number(1), **where}, ["count"])
            then = {"insert": counted, "parameters": {"type": ["object", "null"], "maxProperties": 0}}
        else:
            then = {"parameters": _ref(f"{preset.method}: parameters")}
        rules.append(_when("preset", name, {"properties": then}))
    default = {"properties": {"parameters": _ref(f"{PRESETS['opt_deus'].method}: parameters")}}
    rules.append({"if": {"not": {"required": ["preset"]}}, "then": default})
    return mapping(keys, allOf=rules, description="A deeper model: new layers between those of base_model.")


def _calibrate() -> Schema:
    """The ``calibrate:`` section."""
    keys = {
        "text": text("a text file like the text of the training"),
        "tokens": whole_number(4),
        "length": whole_number(2),
        "held_out": number(exclusiveMinimum=0, exclusiveMaximum=1),
        "method": {"enum": list(METHODS)},
        "damping": number(exclusiveMinimum=0, maximum=1e6),
        "batch": whole_number(1),
        "seed": whole_number(0, 2**63 - 1),
    }
    return mapping(keys, ["text"], description="The zeroed outputs of new layers are set from a text.")


def _tokenizer() -> Schema:
    """The ``tokenizer:`` section."""
    token = mapping({"kind": {"const": "model_token"}, "model": _ref("model"), "token": {"type": ["string", "null"]},
                     "token_id": optional(whole_number())}, ["kind", "model"])  # fmt: skip
    source = {"anyOf": [_ref("model"), mapping({"kind": {"const": "zero"}}, ["kind"]), token, {"type": "null"}]}
    tokens = mapping({"source": source, "force": {"enum": [True, False, 0, 1]}})
    keys = {
        "source": {"anyOf": [{"enum": ["union", "base"]}, _ref("model")]},
        "tokens": optional({"type": "object", "additionalProperties": optional(tokens)}),
        "pad_to_multiple_of": optional(whole_number(1)),
    }
    return mapping(keys, description="The output's tokenizer.")


_Names = dict[tuple[str, str, str], Parameter]


def _parameter_names(every: Iterable[MergeMethod]) -> _Names:
    """Every parameter with its definition's name: its own, or also the method's where another one has that name."""
    found: _Names = {}
    for method in every:
        for parameter in method.parameters:
            same = [name for (_, key, name), p in found.items() if key == parameter.name and p == parameter]
            taken = any(key == parameter.name for _, key, _ in found)
            name = same[0] if same else f"{parameter.name} of {method.name}" if taken else parameter.name
            found[method.name, parameter.name, f"parameter {name.removeprefix('parameter ')}"] = parameter
    return found


def _parameters(names: _Names, every: Iterable[MergeMethod], only: Sequence[Parameter] | None = None) -> Schema:
    """The ``parameters`` of one or of several methods."""
    wanted = {method.name for method in every}
    refs: dict[str, list[str]] = {}
    for method, key, name in names:
        if method in wanted and (only is None or key in {p.name for p in only}):
            refs.setdefault(key, []).append(name)
    forms = {key: [_ref(name) for name in dict.fromkeys(of)] for key, of in sorted(refs.items())}
    properties = {key: of[0] if len(of) == 1 else {"anyOf": of} for key, of in forms.items()}
    return {"type": ["object", "null"], "properties": properties, "additionalProperties": False}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/definitions/{name}"}


def _list(items: Schema, description: str) -> Schema:
    return {"description": description, "type": "array", "items": items, "minItems": 1}


def _when(key: str, value: str, then: Schema) -> Schema:
    """A rule for one value of a key."""
    return {"if": {"properties": {key: {"const": value}}, "required": [key]}, "then": then}
