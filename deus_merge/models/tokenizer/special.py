"""The vocabulary in config.json and generation_config.json: its size, and the new ids of special tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..config_json import Config, section, with_section
from .build import Vocabulary
from .files import Files, as_json, read_json

GENERATION = "generation_config.json"
#: keys with ids whose names do not end in ``token_id`` or ``token_ids``
_LISTS = ("suppress_tokens", "begin_suppress_tokens")


def set_vocabulary(config: Config, path: Sequence[str], vocabulary: Vocabulary) -> tuple[Config, list[str]]:
    """A config.json for the output's tokens.

    Args:
        config: The donor's config.json, with the donor's ids.
        path: Keys that lead to the model's depth; their section has the vocabulary's size.
        vocabulary: The output's tokens.

    Returns:
        A new config, and warnings.
    """
    result, warnings = _renumbered(config, vocabulary)
    if "vocab_size" in result or len(path) < 2:
        result["vocab_size"] = vocabulary.rows
    if len(path) > 1:
        inner, more = _renumbered(section(config, path), vocabulary)
        inner["vocab_size"] = vocabulary.rows
        result = with_section(result, path, inner)
        warnings += more
    return result, [f"config.json: {warning}" for warning in warnings]


def set_generation(files: Files, vocabulary: Vocabulary) -> tuple[dict[str, bytes | Path], list[str]]:
    """The output's files with the output's ids in generation_config.json, and warnings."""
    result = dict(files)
    if GENERATION not in files:
        return result, []
    stored = read_json(files[GENERATION], GENERATION)
    data, warnings = _renumbered(stored, vocabulary)
    if data != stored:
        result[GENERATION] = as_json(data, indent=2)
    return result, [f"{GENERATION}: {warning}" for warning in warnings]


def _renumbered(config: Config, vocabulary: Vocabulary) -> tuple[dict[str, Any], list[str]]:
    """A copy with the output's ids in place of the donor's, and warnings.

    The id of a token that the output lacks becomes the id that the output's tokenizer has for the same purpose.
    """
    result: dict[str, Any] = copy.deepcopy(dict(config))
    warnings = []
    for key, value in config.items():
        if not key.endswith(("token_id", "token_ids")) and key not in _LISTS:
            continue
        new = _each(value, vocabulary.moves.get)
        if new == value or (new in (None, []) and value in (None, [])):
            continue
        if new in (None, []):
            new = vocabulary.roles.get(key)
            warnings.append(f"the token of {key} {value} is not in the output's tokenizer: it is {_shown(new)} now")
        result[key] = new
    return result, warnings


def _each(value: Any, move: Callable[[int], int | None]) -> Any:
    """The value with every id moved. Ids without a new one are left out of lists; anything but an id is unchanged."""
    if isinstance(value, list):
        moved = [_each(item, move) for item in value]
        return [new for new, old in zip(moved, value, strict=True) if new is not None or old is None]
    return move(value) if type(value) is int and value >= 0 else value


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
