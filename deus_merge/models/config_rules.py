"""config.json: whether it fits the tensors, and what it says for another depth."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import ArchitectureError, PlanError
from ..core.units import FLOAT_DTYPES, dtype_name, promoted
from .family import RESIDUAL, Heads
from .view import ModelView

#: lists that may happen to be as long as the model is deep, but are about something else
_NOT_PER_LAYER = ("architectures", "mrope_section", "sizes", "feature_size")
#: lists of layers' numbers
_NUMBERS = ("fullatt_block_indexes", "deepstack_visual_indexes")


@dataclass(frozen=True)
class LayerOrigin:
    """Where an output layer's entries in per-layer lists come from: for a fused layer, its upper neighbour.

    Attributes:
        config: The config.json of the model that layer belongs to.
        layer: Its index there.
        model: The model's name, for messages.
        layers_path: Keys that lead to that model's depth.
    """

    config: Mapping
    layer: int
    model: str
    layers_path: Sequence[str]


def check_config(config: Mapping, view: ModelView, shapes: Mapping[str, tuple[int, ...]], where: object) -> None:
    """Compare config.json with the tensors: what disagrees here loads as another model, or not at all.

    Args:
        config: config.json.
        view: The tensors by layer and role.
        shapes: Of every tensor, by name.
        where: The folder, for messages.

    Raises:
        ArchitectureError: a described family's matrices do not have the config's sizes, or ``layer_types`` its depth.
    """
    section = _section(config, view.layers_path)
    kinds = section.get("layer_types")
    if isinstance(kinds, list) and len(kinds) != view.num_layers:
        raise ArchitectureError(
            "config.json: layer_types does not fit the depth",
            where=where,
            expected=f"{view.num_layers} entries, one a layer",
            got=f"{len(kinds)} entries",
        )
    if view.architecture is None or "quantization_config" in config:  # packed tensors have shapes of their own
        return
    rows, columns = _sizes(section)
    for role, name in ((r, n) for layer in view.layers for r, n in layer.items()):
        spec = view.spec(role)
        if spec is not None and spec.in_space is not None:
            _check_shape(name, shapes[name], (rows.get(spec.out_space), columns.get(spec.in_space)), section, where)
    for name in (*view.architecture.before, *view.architecture.after):
        if len(shapes.get(name, ())) == 2:
            _check_shape(name, shapes[name], (section.get("vocab_size"), columns[RESIDUAL]), section, where)


def heads(config: Mapping, view: ModelView) -> dict[str, object]:
    """How many attention heads a config says there are: shapes alone do not tell."""
    section = _section(config, view.layers_path)
    queries = section.get("num_attention_heads")
    return {"num_attention_heads": queries, "num_key_value_heads": section.get("num_key_value_heads") or queries}


def head_shape(config: Mapping, view: ModelView) -> Heads | None:
    """The attention heads of a described family; None where the config does not tell."""
    section = _section(config, view.layers_path)
    query, size = section.get("num_attention_heads"), _head_size(section)
    key_value = section.get("num_key_value_heads") or query
    if view.architecture is None or not all(_whole(n) for n in (query, key_value, size)):
        return None
    return Heads(query, key_value, size, view.architecture.rotary)


def _head_size(section: Mapping) -> object:
    hidden, queries = section.get("hidden_size"), section.get("num_attention_heads")
    return section.get("head_dim") or (_whole(hidden) and _whole(queries) and hidden // queries)


def _sizes(section: Mapping) -> tuple[dict[str, object], dict[str, object]]:
    """Rows by out space and columns by in space of a layer's matrices, where the config tells them."""
    hidden, queries = section.get("hidden_size"), section.get("num_attention_heads")
    keys = section.get("num_key_value_heads") or queries
    head = _head_size(section)
    query_rows, key_rows = (_whole(n) and _whole(head) and n * head for n in (queries, keys))
    common = {RESIDUAL: hidden, "neurons": section.get("intermediate_size")}
    rows = {**common, "query_heads": query_rows, "key_heads": key_rows, "value_heads": key_rows}
    return rows, {**common, "value_heads": query_rows}  # o reads each value head once for every query head


def _whole(value: object) -> bool:
    return isinstance(value, int) and value > 0


def _check_shape(name: str, shape: tuple[int, ...], wanted: tuple, section: Mapping, where: object) -> None:
    known = [_whole(n) for n in wanted]
    if len(shape) == 2 and any(k and n != w for k, n, w in zip(known, shape, wanted, strict=True)):
        keys = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
        raise ArchitectureError(
            f"config.json does not fit {name}",
            where=where,
            expected=f"shape {[w if k else n for k, n, w in zip(known, shape, wanted, strict=True)]}",
            got=list(shape),
            hint=f"config.json says {', '.join(f'{k}: {section[k]}' for k in keys if section.get(k) is not None)}",
        )


def _section(config: Mapping, layers_path: Sequence[str]) -> Mapping:
    """The part of the config that holds the depth."""
    for key in layers_path[:-1]:
        config = config[key]
    return config


def typed_config(config: Mapping, dtype: str | None) -> dict:
    """A copy of the donor's config.json for the output's dtype (a safetensors code, where the recipe sets one)."""
    result = copy.deepcopy(dict(config))
    if dtype is not None:
        for key in [k for k in ("dtype", "torch_dtype") if k in result] or ["torch_dtype"]:
            result[key] = dtype_name(dtype)
    return result


def widened_config(config: Mapping, written: Iterable[str]) -> Mapping:
    """The config with a dtype that holds all that is written, for a recipe that sets none: a bfloat16 model merged with
    a float32 one gives float32 tensors. ``written``: safetensors codes of floats."""
    names = [str(config[key]) for key in ("dtype", "torch_dtype") if key in config]  # a config may hold anything
    declared = next((FLOAT_DTYPES[name] for name in names if name in FLOAT_DTYPES), None)
    if declared is None:
        return config
    wide = promoted([declared, *written])
    return config if wide == declared else typed_config(config, wide)


def deeper_config(config: Mapping, layers_path: Sequence[str], origins: Sequence[LayerOrigin], where: object) -> dict:
    """The donor's config.json for the output's layers.

    Args:
        config: The donor's config.
        layers_path: Keys that lead to its depth, like ``("num_hidden_layers",)``.
        origins: One entry per output layer.
        where: The donor, for messages.

    Returns:
        A new config: depth set, per-layer lists rebuilt, everything else as it was.

    Raises:
        PlanError: a layer comes from a model that lacks one of the donor's per-layer lists; or the config tells layers
            by their numbers, which are other ones now.
    """
    result = copy.deepcopy(dict(config))
    section = _section(result, layers_path)
    in_place = len(origins) == section[layers_path[-1]] and [o.layer for o in origins] == list(range(len(origins)))
    for key in (k for k in _NUMBERS if section.get(k) and not in_place):
        raise PlanError(f"config.json's {key} tells layers by their numbers", where=where, got=section[key])
    for key in layer_lists(config, layers_path):
        section[key] = [_entry(key, origin) for origin in origins]
    section[layers_path[-1]] = len(origins)
    return result


def config_patch(config: Mapping, target: Mapping) -> dict:
    """What turns ``config`` into ``target``, as a JSON merge patch (RFC 7386): None stands for a key to remove."""
    patch: dict[str, object] = {key: None for key in config if key not in target}
    for key, value in target.items():
        ours = config.get(key)
        if isinstance(ours, Mapping) and isinstance(value, Mapping):
            if inner := config_patch(ours, value):
                patch[key] = inner
        elif key not in config or ours != value:
            patch[key] = copy.deepcopy(value)
    return patch


def layer_lists(config: Mapping, layers_path: Sequence[str]) -> dict[str, list]:
    """Every list with one entry a layer, spelled out where the config only implies it (Qwen2's sliding window)."""
    section = _section(config, layers_path)
    depth = section[layers_path[-1]]
    lists = {
        key: value
        for key, value in section.items()
        if isinstance(value, list) and len(value) == depth and not _about_something_else(key)
    }
    first_sliding = section.get("max_window_layers")
    if section.get("use_sliding_window") and isinstance(first_sliding, int) and "layer_types" not in lists:
        kinds = ("full_attention", "sliding_attention")
        lists["layer_types"] = [kinds[i >= first_sliding] for i in range(depth)]
    return lists


def _about_something_else(key: str) -> bool:
    return key in (*_NOT_PER_LAYER, *_NUMBERS) or key.endswith(("token_id", "token_ids", "tokens"))


def _entry(key: str, origin: LayerOrigin) -> object:
    lists = layer_lists(origin.config, origin.layers_path)
    if key not in lists:
        raise PlanError(
            f"the model's config.json has no per-layer list {key!r}, which the donor has",
            where=origin.model,
            hint="choose a base_model of the same kind",
        )
    return lists[key][origin.layer]
