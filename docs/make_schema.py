"""Writes docs/manifest.schema.json from the classes of the manifest; a test checks that it is up to date. Run:
python docs/make_schema.py"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from deus_merge.core.typed_json import Range, is_required
from deus_merge.report.manifest import FORMAT, Manifest

PAGE = Path(__file__).parent / "manifest.schema.json"
_SCALARS = {str: "string", bool: "boolean", int: "integer", float: "number"}


def build() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the newest format."""
    definitions: dict[str, Any] = {}
    _schema(Manifest, definitions)
    main = definitions.pop("Manifest")
    properties = {
        **main["properties"],
        "format": {"const": FORMAT, "description": "The version of this format."},
        "sha256": {
            "type": "string",
            "pattern": "^[0-9a-f]{64}$",
            "description": "The seal: sha256 of all bytes before its line.",
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"deus_merge.json, format {FORMAT}",
        "description": "Generated from the code by docs/make_schema.py; docs/manifest.md explains it.",
        "type": "object",
        "properties": properties,
        "required": [*main["required"], "sha256"],
        "$defs": dict(sorted(definitions.items())),
    }


def render() -> str:
    """The file's text."""
    return json.dumps(build(), indent=2, ensure_ascii=False) + "\n"


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of an annotation; classes are added to the definitions."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return {"anyOf": [_schema(inner, definitions), {"type": "null"}]}
    if origin is Annotated:
        (bounds,) = (extra for extra in arguments[1:] if isinstance(extra, Range))
        above = {} if bounds.maximum is None else {"maximum": bounds.maximum}
        return {"type": "integer", "minimum": bounds.minimum, **above}
    if origin in (tuple, Sequence):
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"enum": [member.value for member in kind]}
    if kind in _SCALARS:
        return {"type": _SCALARS[kind]}
    if kind.__name__ not in definitions:
        definitions[kind.__name__] = _object(kind, definitions)
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _object(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a dataclass or a typed dictionary, described by its docstring."""
    hints = get_type_hints(kind, include_extras=True)
    if is_typeddict(kind):
        required = [name for name in hints if name in kind.__required_keys__]
    else:
        required = [field.name for field in dataclasses.fields(kind) if is_required(field)]
    text = inspect.getdoc(kind) or ""
    about = _attributes(text)
    return {
        "description": _one_line(text.split("\n\n")[0]),
        "type": "object",
        "properties": {
            name: {**_schema(hint, definitions), "description": about[name]} for name, hint in hints.items()
        },
        "required": required,
    }


def _attributes(docstring: str) -> dict[str, str]:
    """The descriptions in the Attributes section of a docstring, by name."""
    section = docstring.split("Attributes:\n")[1]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: _one_line(text) for name, text in entries}


def _one_line(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
