"""YAML values with their recipe path and line, so that every error message can name the place.

`core.yaml_text` reads them. This module does not know what a recipe is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from .errors import RecipeError, nearest

Scalar = bool | int | float | str | None
#: YAML data without places
Plain = bool | int | float | str | list["Plain"] | dict[str, "Plain"] | None


@dataclass(frozen=True)
class Located:
    """One YAML value with its place.

    Attributes:
        value: A scalar, the items of a list, or the values of a mapping by key.
        path: The recipe path, like ``slices[2].sources[0].layer_range``.
        line: 1-based line in the file; 0 for a value that was not read from a file.
        file: The file's name in messages, or the option that the value comes from, like ``--set``.
        shared: For a value of a document's top level: whether aliases in other parts of the document refer to it, or
            to something in it.
    """

    value: Scalar | tuple[Located, ...] | dict[str, Located]
    path: str = ""
    line: int = 0
    file: str = "recipe"
    shared: bool = field(default=False, compare=False, repr=False)

    @property
    def where(self) -> str:
        """The place for messages: the path, and the line or the option."""
        if self.line:
            return f"{self.path or self.file} (line {self.line})"
        return f"{self.path} ({self.file})" if self.path and self.file.startswith("--") else self.path or self.file

    def fail(self, message: str, *, expected: object = None, got: object = None, hint: str | None = None) -> NoReturn:
        """Raise a RecipeError at this place; ``got`` is this value unless given."""
        if got is None:
            got = self.shown()
        raise RecipeError(message, where=self.where, expected=expected, got=got, hint=hint)

    def shown(self) -> str:
        """The value as messages show it: YAML on one line, cut to 80 characters."""
        text = ""
        for part in self._flow():
            text += part
            if len(text) > 80:
                return text[:77] + "..."
        return text

    def _flow(self) -> Iterator[str]:
        """The value in YAML's flow style, part by part, so that a large value is not rendered whole."""
        if isinstance(self.value, dict):
            yield "{"
            for i, (key, item) in enumerate(self.value.items()):
                yield f"{', ' if i else ''}{key[:100]}: "
                yield from item._flow()
            yield "}"
        elif isinstance(self.value, tuple):
            yield "["
            for i, item in enumerate(self.value):
                yield ", " if i else ""
                yield from item._flow()
            yield "]"
        elif isinstance(self.value, str):
            yield repr(self.value[:100])
        else:
            yield "nothing" if self.value is None else str(self.value).lower()

    def plain(self) -> Plain:
        """The value as plain Python data, without places."""
        if isinstance(self.value, dict):
            return {k: v.plain() for k, v in self.value.items()}
        if isinstance(self.value, tuple):
            return [v.plain() for v in self.value]
        return self.value

    def child(self, key: str) -> Located:
        """The value of a key, of a mapping that is known to have it."""
        assert isinstance(self.value, dict)
        return self.value[key]

    def mapping(self, allowed: Collection[str] = (), kind: str = "a mapping") -> dict[str, Located]:
        """This value as a mapping.

        Args:
            allowed: The keys it may have; empty for any.
            kind: The kind of value, for messages: ``"a slice"``.

        Raises:
            RecipeError: not a mapping, or a key that is not allowed.
        """
        keys = ", ".join(sorted(allowed))
        if not isinstance(self.value, dict):
            self.fail(f"must be {kind}", expected=f"key: value pairs{keys and f', with the keys {keys}'}")
        for key, item in self.value.items():
            if allowed and key not in allowed:
                item.fail(f"unknown key {key!r}", expected=keys, got=key, hint=nearest(key, allowed))
        return self.value

    def sequence(self, kind: str = "a list", expected: str = "a non-empty list") -> tuple[Located, ...]:
        """This value as a non-empty list; raises RecipeError otherwise."""
        if not isinstance(self.value, tuple) or not self.value:
            self.fail(f"must be {kind}", expected=expected)
        return self.value

    def string(self, expected: str) -> str:
        """This value as text that is not blank; raises RecipeError otherwise."""
        if not isinstance(self.value, str) or not self.value.strip():
            self.fail("wrong value", expected=expected)
        return self.value

    def integer(self, minimum: int = 0) -> int:
        """This value as an integer of at least ``minimum``, also from ``"3"`` or ``3.0``; RecipeError otherwise."""
        value = self.value
        if isinstance(value, str) and re.fullmatch(r"\d{1,18}", value):
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.fail("wrong value", expected=f"a whole number of at least {minimum}")
        return value

    def choice(self, known: Collection[str], kind: str) -> str:
        """This value as one of the ``known`` words; raises RecipeError otherwise, with the nearest of them."""
        if not isinstance(self.value, str) or self.value not in known:
            self.fail(f"unknown {kind}", expected=" | ".join(sorted(known)), hint=nearest(str(self.value), known))
        return self.value


def locate(value: object, path: str = "", file: str = "recipe") -> Located:
    """Plain data (``Plain``, also with tuples for lists) as a `Located` tree without lines.

    Args:
        value: The data.
        path: Its recipe path.
        file: Where it comes from, for messages.

    Raises:
        RecipeError: a value that YAML cannot hold.
    """
    if isinstance(value, dict):
        return Located({str(k): locate(v, under(path, k), file) for k, v in value.items()}, path, file=file)
    if isinstance(value, list | tuple):
        return Located(tuple(locate(v, f"{path}[{i}]", file) for i, v in enumerate(value)), path, file=file)
    if not isinstance(value, bool | int | float | str | None):
        place = Located(None, path, file=file)
        place.fail("not a plain value", expected="text, a number or true/false", got=type(value).__name__)
    return Located(value, path, file=file)


def under(path: str, key: object) -> str:
    """The recipe path of a key of the mapping at ``path``."""
    return f"{path}.{key}" if path else str(key)
