"""The JSON Schema of parameters: plain values, gradients, filters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..core.parameters import REQUIRED, Parameter

Schema = dict[str, Any]

NUMBER = r"^\s*[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?\s*$"
_ROLES = {"type": "array", "items": {"type": "string"}, "minItems": 1}


def number(**bounds: float | None) -> Schema:
    """A number, also as text: for PyYAML ``1e-3`` is one. Bounds hold for numbers."""
    return {"type": ["number", "string"], "pattern": NUMBER, **_given(bounds)}


def whole_number(minimum: float | None = 0, maximum: float | None = None, pattern: str = r"^\d+$") -> Schema:
    """A whole number, also as text of a pattern."""
    bounds = {"minimum": minimum, "maximum": maximum}
    return {"type": ["integer", "string"], "pattern": pattern, **_given(bounds)}


def _given(bounds: Mapping[str, float | None]) -> Schema:
    return {key: bound for key, bound in bounds.items() if bound is not None}


def text(description: str = "") -> Schema:
    """Text that is not blank."""
    return {"type": "string", "pattern": r"\S", **({"description": description} if description else {})}


def optional(schema: Schema) -> Schema:
    """The schema, or no value; in a form for which editors have plain messages."""
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], None]}
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    if isinstance(schema.get("type"), str):
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


#: what a parameter of kind ``other`` takes, in the words of its messages -> its schema
OTHER: dict[str, Schema] = {
    "a number above 0": number(exclusiveMinimum=0),
    "a number above 0, or auto": {"anyOf": [number(exclusiveMinimum=0), {"const": "auto"}]},
    "a number above 0 and at most 1": number(exclusiveMinimum=0, maximum=1),
    "a number from 0 to 1, or even": {"anyOf": [number(minimum=0, maximum=1), {"const": "even"}]},
    "a cosine from -1 to 1, or none": {"anyOf": [number(minimum=-1, maximum=1), {"enum": ["none", None]}]},
    "true, false, or a list of roles like [o, down]": {"anyOf": [{"type": "boolean"}, _ROLES]},
}


def plain(parameter: Parameter) -> Schema:
    """The schema of one plain value of a parameter; everything where it is not known."""
    if parameter.parse is not None:
        if words := re.fullmatch(r"a list of (\w+(?:, \w+)+)", parameter.expected):
            return {"type": "array", "items": {"enum": words[1].split(", ")}, "minItems": 1}
        return OTHER.get(parameter.expected, {})
    if parameter.kind == "boolean":
        words = "^([Tt][Rr][Uu][Ee]|[Ff][Aa][Ll][Ss][Ee])$"
        return {"type": ["boolean", "integer", "string"], "minimum": 0, "maximum": 1, "pattern": words}
    if parameter.kind == "choice":
        return {"enum": list(parameter.choices)}
    low, high = parameter.minimum, parameter.maximum
    if parameter.kind == "number":
        return number(minimum=low, maximum=high)
    return whole_number(low, high, NUMBER)


def setting(parameter: Parameter, own: str) -> Schema:
    """The schema of a parameter in a recipe.

    Args:
        parameter: The parameter.
        own: A reference to this schema, for values within filters.
    """
    value = plain(parameter)
    forms = [value]
    if parameter.kind in ("number", "other"):
        forms.append({"type": "array", "items": value, "minItems": 1, "description": "a gradient over the layers"})
    if parameter.scope != "block":
        entry = {
            "type": "object",
            "properties": {"filter": {"type": ["string", "null"]}, "value": {"$ref": own}},
            "required": ["value"],
            "additionalProperties": False,
        }
        an_entry = {"allOf": [{"$ref": own}, {"type": "object"}]}
        entries = {"type": "array", "items": an_entry, "minItems": 1, "description": "values by parts of tensor names"}
        forms += [entry, entries]
    return {**(value if len(forms) == 1 else {"anyOf": forms}), **_about(parameter)}


def _about(parameter: Parameter) -> Schema:
    """The description and the default, which editors show."""
    default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
    about: Schema = {"description": f"{parameter.help} ({parameter.expected})"}
    return about if default == REQUIRED or default is None else {**about, "default": default}


def mapping(properties: Schema, required: Iterable[str] = (), **more: Any) -> Schema:
    """A mapping with these keys and no other."""
    needed = list(required)
    schema = {"type": "object", "properties": properties, "additionalProperties": False, **more}
    return {**schema, "required": needed} if needed else schema
