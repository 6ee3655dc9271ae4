"""The vocabulary in config.json and generation_config.json: its size, and ids of special tokens where they move."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

from .build import Vocabulary
from .files import Files, as_json, read_json

GENERATION = "generation_config.json"
#: keys with ids that do not end like the others
_LISTS = ("suppress_tokens", "begin_suppress_tokens")


def set_vocabulary(config: Mapping, path: Sequence[str], vocabulary: Vocabulary) -> tuple[dict, list[str]]:
    """A config.json for the output's tokens.

    Args:
        config: The donor's, with the donor's ids.
        path: Keys that lead to the model's depth: its section has the vocabulary's size.
        vocabulary: The output's.

    Returns:
        A new config, and what to warn of.
    """
    result = copy.deepcopy(dict(config))
    section = result
    for key in path[:-1]:
        section = section[key]
    section["vocab_size"] = vocabulary.rows
    if "vocab_size" in result:
        result["vocab_size"] = vocabulary.rows
    told = _renumber(result, vocabulary)
    if section is not result:
        told += _renumber(section, vocabulary)
    return result, [f"config.json: {t}" for t in told]


def set_generation(files: Files, vocabulary: Vocabulary) -> tuple[dict, list[str]]:
    """The output's files, with the ids in generation_config.json; and what to warn of."""
    files = dict(files)
    if GENERATION not in files:
        return files, []
    stored = read_json(files[GENERATION], GENERATION)
    data = copy.deepcopy(stored)
    told = _renumber(data, vocabulary)
    if data != stored:
        files[GENERATION] = as_json(data, indent=2)
    return files, [f"{GENERATION}: {t}" for t in told]


def _renumber(section: dict, vocabulary: Vocabulary) -> list[str]:
    """Ids of the donor's tokens become the output's, in place. One whose token is gone becomes that of the output's
    tokenizer, if this has one for the purpose."""
    told = []
    for key, value in section.items():
        if not key.endswith(("token_id", "token_ids")) and key not in _LISTS:
            continue
        new = _each(value, vocabulary.moves.get)
        if new == value or (new in (None, []) and value in (None, [])):
            continue
        if new in (None, []):
            new = vocabulary.roles.get(key)
            told.append(f"the token of {key} {value} is not in the output's tokenizer: it is {_shown(new)} now")
        section[key] = new
    return told


def _each(value: object, move: Callable[[int], int | None]) -> object:
    """Every id in a value moved; in lists, those without a place are left out. What is no id stays."""
    if isinstance(value, list):
        moved = [_each(item, move) for item in value]
        return [new for new, old in zip(moved, value, strict=True) if new is not None or old is None]
    return move(value) if type(value) is int and value >= 0 else value


def _shown(value: object) -> str:
    return "not set" if value is None else str(value)
