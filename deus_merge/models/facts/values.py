"""Checks of values that configs hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .base import Key, Unsayable, dotted


def integers(values: Any, key: Key) -> list[int]:
    """The values, if they are a list of integers; `Unsayable` if not."""
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise Unsayable(dotted(key), f"is {values!r}, not integers")
    return values


def two_kinds(values: Sequence[Any], kinds: Sequence[Any], key: Key) -> None:
    """Check that all values are among the kinds that a key can say; `Unsayable` if not."""
    for value in values:
        if value not in kinds:
            raise Unsayable(dotted(key), f"knows no {value!r}")


def known_word(words: Mapping[Any, Any], value: Any, key: str) -> Any:
    """The word of a key for a value; `Unsayable` if it has none."""
    try:
        return words[value]
    except (KeyError, TypeError):
        raise Unsayable(key, f"has no word for {value!r}") from None
