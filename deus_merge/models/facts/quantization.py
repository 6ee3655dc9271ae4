"""Layer numbers in the names of modules in ``quantization_config``: found, and renumbered."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..config_json import Config, value_at
from ..stacks import is_of_stack
from .base import Pinned

FACT = "quantization_config"
#: keys of config.json that hold settings of quantised weights
SECTIONS = ("quantization_config", "compression_config")
#: a layer's number in a module's name, or in a pattern that quotes its dots and says no more about the number
_NUMBERED = re.compile(r"(?<![A-Za-z_])(layers|layer|h|blocks|block)(\\?\.)(0|[1-9]\d*)(?=\\?\.(?![*+?])|$)")
_UNCLEAR = re.compile(r"(?<![A-Za-z])(?:layers?|blocks?)[^A-Za-z]*\d")
_SLOT = "\0"

#: where a name stands, the name with a slot for the number, and the settings under it as JSON
_Place = tuple[tuple[str, ...], str, str]


def read(config: Config, layers_path: Sequence[str], depth: int) -> list[Any] | None:
    """What ``quantization_config`` says of each layer of a stack; None where it names no layer.

    Args:
        config: config.json.
        layers_path: The keys that lead to the stack's depth.
        depth: The number of layers.
    """
    found: list[list[_Place]] = [[] for _ in range(depth)]
    for keys in _sections(config):
        for place, text, settings in _names(value_at(config, keys), keys):
            number, name = _split(text, layers_path)
            if number is None and name is not None:
                reason = f"names layers in a way that cannot be renumbered: {text!r}"
                return [Pinned(i, depth, reason) for i in range(depth)]
            if number is not None and number < depth and name is not None:
                found[number].append((place, name, settings))
    return [tuple(sorted(names)) for names in found] if any(found) else None


def write(config: Config, layers_path: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """The sections of a config that `SECTIONS` names, for other layers: of a part of the config only these.

    Args:
        config: The config of the donor.
        layers_path: As in `read`.
        values: One value of `read` for each layer of the output.
    """

    def renumbered(place: tuple[str, ...], text: str) -> list[str] | None:
        number, name = _split(text, layers_path)
        if number is None:
            return None
        here = [i for i, value in enumerate(values) if any((p, n) == (place, name) for p, n, _ in value)]
        return [(name or "").replace(_SLOT, str(i)) for i in here]

    changed: dict[str, Any] = {}
    for keys in _sections(config):
        section = _renamed(value_at(config, keys), keys, renumbered)
        changed |= {keys[0]: section} if len(keys) == 1 else {keys[0]: {**changed.get(keys[0], {}), keys[1]: section}}
    return changed


def _sections(config: Config) -> list[tuple[str, ...]]:
    """The keys that lead to each section, at the top or in a part like ``text_config``."""
    parts = [key for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)]
    places = [(key,) for key in SECTIONS] + [(part, key) for part in parts if part not in SECTIONS for key in SECTIONS]
    return [keys for keys in places if isinstance(value_at(config, keys), Mapping)]


def _names(value: Any, place: tuple[str, ...]) -> Iterator[_Place]:
    """Every string of a section that may be the name of a module."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield place, str(key), json.dumps(inner, sort_keys=True)
            yield from _names(inner, (*place, _NUMBERED.sub(_SLOT, str(key))))
    elif isinstance(value, list):
        for entry in value:
            if isinstance(entry, str):
                yield place, entry, ""
            else:
                yield from _names(entry, place)
    elif isinstance(value, str) and (_UNCLEAR.search(value) or _NUMBERED.search(value)):
        yield place, f"{value}{_SLOT}", ""  # no list and no key: nothing to renumber


def _split(text: str, layers_path: Sequence[str]) -> tuple[int | None, str | None]:
    """A layer's number in a name, and the name with a slot for it; a name alone: it cannot be told which number."""
    matches = list(_NUMBERED.finditer(text))
    if not is_of_stack(text, layers_path) or not (matches or _UNCLEAR.search(text)):
        return None, None
    rest = _NUMBERED.sub("", text)
    if len(matches) != 1 or _UNCLEAR.search(rest) or _SLOT in text:
        return None, text
    start, end = matches[0].span(3)
    return int(matches[0][3]), text[:start] + _SLOT + text[end:]


def _renamed(value: Any, place: tuple[str, ...], names: Callable[[tuple[str, ...], str], list[str] | None]) -> Any:
    if isinstance(value, dict):
        result = {}
        for key, inner in value.items():
            new = names(place, key)
            inside = _renamed(inner, (*place, _NUMBERED.sub(_SLOT, key)), names)
            result |= dict.fromkeys([key] if new is None else new, inside)
        return result
    if not isinstance(value, list):
        return value
    entries: list[Any] = []
    for entry in value:
        new = names(place, entry) if isinstance(entry, str) else None
        renamed = [_renamed(entry, place, names)] if new is None else new
        entries += [name for name in renamed if not isinstance(name, str) or name not in entries]
    return entries
