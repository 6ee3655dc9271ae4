"""config.json for another depth: the layer count, and every list that has one entry a layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import PlanError
from .units import dtype_name

#: lists that may happen to be as long as the model is deep, but are about something else
_NOT_PER_LAYER = ("architectures", "mrope_section", "sizes", "feature_size")


@dataclass(frozen=True)
class LayerOrigin:
    """Where an output layer's entries in per-layer lists come from: for a fused layer, its upper neighbour.

    Attributes:
        config: The config.json of the model that layer belongs to.
        layer: Its index there.
        model: The model's name, for messages.
    """

    config: Mapping
    layer: int
    model: str


def deeper_config(
    config: Mapping, layers_path: Sequence[str], origins: Sequence[LayerOrigin], dtype: str | None
) -> dict:
    """The donor's config.json for the output's layers.

    Args:
        config: The donor's config.
        layers_path: Keys that lead to its depth, like ``("num_hidden_layers",)``.
        origins: One entry per output layer.
        dtype: safetensors code of the output's dtype when the recipe sets one.

    Returns:
        A new config: depth set, per-layer lists rebuilt, dtype set, everything else as it was.

    Raises:
        PlanError: a layer comes from a model that lacks one of the donor's per-layer lists.
    """
    result = copy.deepcopy(dict(config))
    section, parents = result, tuple(layers_path[:-1])
    for key in parents:
        section = section[key]
    for key in layer_lists(config, layers_path):
        section[key] = [_entry(key, origin, layers_path) for origin in origins]
    section[layers_path[-1]] = len(origins)
    if dtype is not None:
        keys = [k for k in ("dtype", "torch_dtype") if k in result] or ["torch_dtype"]
        for key in keys:
            result[key] = dtype_name(dtype)
    return result


def layer_lists(config: Mapping, layers_path: Sequence[str]) -> dict[str, list]:
    """Every list with one entry a layer, spelled out where the config only implies it (Qwen2's sliding window)."""
    section = config
    for key in layers_path[:-1]:
        section = section[key]
    depth = section[layers_path[-1]]
    lists = {
        key: value
        for key, value in section.items()
        if isinstance(value, list) and len(value) == depth and not _about_something_else(key)
    }
    first_sliding = section.get("max_window_layers")
    if section.get("use_sliding_window") and first_sliding is not None and "layer_types" not in lists:
        kinds = ("full_attention", "sliding_attention")
        lists["layer_types"] = [kinds[i >= first_sliding] for i in range(depth)]
    return lists


def _about_something_else(key: str) -> bool:
    return key in _NOT_PER_LAYER or key.endswith(("token_id", "token_ids", "tokens"))


def _entry(key: str, origin: LayerOrigin, layers_path: Sequence[str]) -> object:
    lists = layer_lists(origin.config, layers_path)
    if key not in lists:
        raise PlanError(
            f"the model's config.json has no per-layer list {key!r}, which the donor has",
            where=origin.model,
            hint="choose a base_model of the same kind",
        )
    return lists[key][origin.layer]
