"""``vision_feature_layer``: the layers of a vision tower after which the language model takes its features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config_json import Config
from .base import Pinned, Unsayable

FACT = "vision_feature_layer"
_KEYS = ("vision_feature_layer", "vision_feature_layers")


def read(config: Config, layers_path: Sequence[str], depth: int) -> list[Any] | None:
    """For each layer of the tower, the entries of the key that mean the state after it; None where there are none.

    Args:
        config: config.json.
        layers_path: Unused: there is one tower.
        depth: The tower's number of layers.
    """
    del layers_path
    key = _key(config)
    if key is None:
        return None
    entries = _entries(config[key])
    if entries is None or any(not -depth - 1 <= entry <= depth for entry in entries):
        return [Pinned(i, depth, f"does not name layers of a tower of {depth}") for i in range(depth)]
    states = [entry if entry >= 0 else depth + 1 + entry for entry in entries]
    return [[k for k, state in enumerate(states) if state == i + 1] for i in range(depth)]


def write(config: Config, layers_path: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """The key for another tower: each entry means the state after the last of the layers that it meant.

    Args:
        config: The config of the donor.
        layers_path: Unused.
        values: One value of `read` for each layer of the output.

    Raises:
        Unsayable: a layer that the config names is not there.
    """
    del layers_path
    key = _key(config)
    entries = _entries(config[key]) if key else None
    if key is None or entries is None:
        return {}
    depth, new = len(values), []
    for k, entry in enumerate(entries):
        after = [i for i, value in enumerate(values) if k in value]
        if depth + entry in after or entry - 1 in after[-1:]:
            new.append(entry)
        elif after:
            new.append(after[-1] + 1 if entry > 0 else after[-1] - depth)
        elif entry == 0:
            new.append(0)
        else:
            raise Unsayable(key, f"names a layer of the vision tower that the output lacks ({entry})")
    return {key: new[0] if isinstance(config[key], int) else new}


def _key(config: Config) -> str | None:
    return next((key for key in _KEYS if config.get(key) is not None), None)


def _entries(value: Any) -> list[int] | None:
    entries = [value] if type(value) is int else value
    return entries if isinstance(entries, list) and all(type(entry) is int for entry in entries) else None
