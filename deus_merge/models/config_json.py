"""Values of a model's config.json by their keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: config.json as parsed; its values may be anything until they are checked
Config = Mapping[str, Any]


def section(config: Config, layers_path: Sequence[str]) -> Config:
    """The part of a config.json that describes a stack of layers.

    Args:
        config: config.json, or a copy of it.
        layers_path: The keys that lead to the stack's depth, like ``("text_config", "num_hidden_layers")``; empty for
            a model without layers.

    Returns:
        The mapping that holds the last key: ``config`` itself, or a mapping within it.
    """
    for key in layers_path[:-1]:
        config = config[key]
    return config


def with_section(config: Config, layers_path: Sequence[str], new: Config) -> dict[str, Any]:
    """A copy of a config.json whose `section` is ``new``; the order of keys is unchanged."""
    if len(layers_path) < 2:
        return dict(new)
    return {**config, layers_path[0]: with_section(config[layers_path[0]], layers_path[1:], new)}


def class_names(config: Config) -> tuple[str, ...]:
    """The names of the model's classes in transformers, in order: ``architectures``, where it is a list of names."""
    names = config.get("architectures")
    return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()


def dtype_named(config: Config) -> str | None:
    """The name of the weights' dtype: ``dtype``, or ``torch_dtype`` of older versions; None where it is no name."""
    name = config.get("dtype") or config.get("torch_dtype")
    return name if isinstance(name, str) else None


def value_at(config: Config, path: Sequence[str]) -> Any:
    """The value under these keys; None where a key is missing."""
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def patched(config: Config, patch: Config) -> dict[str, Any]:
    """A config with a JSON merge patch (RFC 7386) applied; None removes a key."""
    result = {key: value for key, value in config.items() if key not in patch or patch[key] is not None}
    for key, value in patch.items():
        if isinstance(value, Mapping):
            inner = result.get(key)
            result[key] = patched(inner if isinstance(inner, Mapping) else {}, value)
        elif value is not None:
            result[key] = value
    return result
