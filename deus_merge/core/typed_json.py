"""Dataclasses that are read from JSON and written to JSON: the annotations are the schema.

Supported annotations: ``str``, ``bool``, ``int``, ``float``, ``Any``, an `Enum` of strings, a frozen dataclass, a
`TypedDict` (which keeps keys that it does not name), ``tuple[X, ...]``, ``Sequence[X]``, ``Mapping[str, X]``,
``X | None``, and ``Annotated[int, Range(...)]``. A field with a default may be missing in the JSON, and is omitted
where it has its default. Unknown keys of a dataclass are ignored.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

Reader = Callable[[Any], Any]
T = TypeVar("T")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True)
class Range:
    """Bounds of a whole number, both inclusive; ``maximum`` None for no bound."""

    minimum: int
    maximum: int | None = None

    def __str__(self) -> str:
        above = f"of at least {self.minimum}" if self.maximum is None else f"from {self.minimum} to {self.maximum}"
        return f"a whole number {above}"


class Misfit(Exception):
    """A JSON value that does not fit its annotation.

    Attributes:
        place: Where it is: ``layers[3].sources[0].layer``.
        expected: What would fit, in words.
        got: The value, shortened; None where it is missing.
    """

    def __init__(self, expected: str, got: str | None, place: str = ""):
        super().__init__(place, expected, got)
        self.place, self.expected, self.got = place, expected, got

    def inside(self, step: str) -> Misfit:
        """The same, seen from the value that holds it: ``step`` is ``[3]``, ``.layer`` or ``['a name']``."""
        return Misfit(self.expected, self.got, f"{step}{self.place}")


def parse(kind: type[T], value: object) -> T:
    """A JSON value as an instance of ``kind``.

    Args:
        kind: A dataclass, or any annotation that this module supports.
        value: What `json.loads` gave.

    Raises:
        Misfit: the value, or one in it, does not fit.
    """
    try:
        return reader(kind)(value)
    except Misfit as misfit:
        raise Misfit(misfit.expected, misfit.got, misfit.place.removeprefix(".")) from None


def dump(value: Any) -> Any:
    """An instance as JSON data, without the fields that have their defaults."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: dump(item) for field, item in found if not _has_default(field, item)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: dump(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [dump(item) for item in value]
    return value


def _has_default(field: dataclasses.Field, value: object) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return value == field.default_factory()
    return field.default is not dataclasses.MISSING and value == field.default


def step(key: str) -> str:
    """A key as a part of a place."""
    return f".{key}" if len(key) <= 200 and _IDENTIFIER.fullmatch(key) else f"[{key[:200]!r}]"


def shown(value: object) -> str:
    """A JSON value for a message; only the kind of a list or an object, which may be large."""
    if isinstance(value, dict | list | tuple):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return repr(value[:200]) if isinstance(value, str) else str(value)


@cache
def reader(kind: Any) -> Reader:
    """The function that reads values of an annotation."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value: value
    if origin in (Union, types.UnionType):
        (inner,) = (reader(argument) for argument in arguments if argument is not type(None))
        return lambda value: None if value is None else inner(value)
    if origin is Annotated:
        (bounds,) = (extra for extra in arguments[1:] if isinstance(extra, Range))
        return _number(bounds)
    if origin in (tuple, Sequence):
        return _list(reader(arguments[0]))
    if origin is Mapping:
        return _object(reader(arguments[1]))
    if is_typeddict(kind):
        return _typed_dict(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _choice(kind)
    return _scalar(kind)


def _scalar(kind: type) -> Reader:
    expected = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}[kind]
    fitting = (int, float) if kind is float else (kind,)

    def read(value: Any) -> Any:
        if type(value) not in fitting:
            raise Misfit(expected, shown(value))
        return value

    return read


def _number(bounds: Range) -> Reader:
    def read(value: Any) -> int:
        too_large = bounds.maximum is not None and type(value) is int and value > bounds.maximum
        if type(value) is not int or value < bounds.minimum or too_large:
            raise Misfit(str(bounds), shown(value))
        return value

    return read


def _choice(kind: type[Enum]) -> Reader:
    known = {member.value: member for member in kind}

    def read(value: Any) -> Enum:
        if not isinstance(value, str) or value not in known:
            raise Misfit(" | ".join(known), shown(value))
        return known[value]

    return read


def _list(read_item: Reader) -> Reader:
    def read(value: Any) -> tuple:
        if not isinstance(value, list | tuple):
            raise Misfit("a list", shown(value))
        items = []
        for i, item in enumerate(value):
            try:
                items.append(read_item(item))
            except Misfit as misfit:
                raise misfit.inside(f"[{i}]") from None
        return tuple(items)

    return read


def _object(read_item: Reader) -> Reader:
    def read(value: Any) -> dict:
        if not isinstance(value, dict):
            raise Misfit("an object", shown(value))
        items = {}
        for key, item in value.items():
            try:
                items[key] = read_item(item)
            except Misfit as misfit:
                raise misfit.inside(step(key)) from None
        return items

    return read


def _typed_dict(kind: Any) -> Reader:
    readers = {name: reader(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}

    def read(value: Any) -> dict:
        return {**_require_object(value), **_read_keys(value, readers, kind.__required_keys__)}

    return read


def _dataclass(kind: Any) -> Reader:
    hints = get_type_hints(kind, include_extras=True)
    readers = {field.name: reader(hints[field.name]) for field in dataclasses.fields(kind)}
    required = frozenset(field.name for field in dataclasses.fields(kind) if is_required(field))
    return lambda value: kind(**_read_keys(_require_object(value), readers, required))


def is_required(field: dataclasses.Field) -> bool:
    """Whether the JSON must have a field: whether it has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _require_object(value: Any) -> dict:
    if not isinstance(value, dict):
        raise Misfit("an object", shown(value))
    return value


def _read_keys(value: dict, readers: Mapping[str, Reader], required: frozenset[str]) -> dict[str, Any]:
    found = {}
    for name, read in readers.items():
        if name in value:
            try:
                found[name] = read(value[name])
            except Misfit as misfit:
                raise misfit.inside(step(name)) from None
        elif name in required:
            raise Misfit("this key", None, step(name))
    return found
