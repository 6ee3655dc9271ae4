"""config.json: checked against the tensors, and rewritten for another depth or dtype."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from ..core.errors import ArchitectureError, PlanError
from ..core.units import FLOAT_DTYPES, dtype_name, promoted
from .config_json import Config, section, with_section
from .family import RESIDUAL, Heads
from .view import ModelView

#: lists that are not per layer, though their length may equal the depth by chance
_NOT_PER_LAYER = ("architectures", "mrope_section", "sizes", "feature_size")
#: lists of layer indices
_LAYER_INDICES = ("fullatt_block_indexes", "deepstack_visual_indexes")


@dataclass(frozen=True)
class LayerEntries:
    """The source layer whose entries in per-layer lists an output layer takes: for a fused layer, its upper neighbour.

    Attributes:
        config: The config.json of the source layer's model.
        layer: The source layer's index.
        model: The model's name, for messages.
        layers_path: Keys that lead to the model's depth.
    """

    config: Config
    layer: int
    model: str
    layers_path: Sequence[str]


def check_config(config: Config, view: ModelView, shapes: Mapping[str, tuple[int, ...]], where: object) -> None:
    """Compare config.json with the tensors. If they disagree, transformers loads another model or none.

    Args:
        config: config.json.
        view: The tensors by layer and role.
        shapes: The shape of every tensor, by name.
        where: The folder, for messages.

    Raises:
        ArchitectureError: a described family's matrices do not have the config's sizes, or the length of
            ``layer_types`` is not the depth.
    """
    sizes = section(config, view.layers_path)
    kinds = sizes.get("layer_types")
    if isinstance(kinds, list) and len(kinds) != view.num_layers:
        raise ArchitectureError(
            "config.json: layer_types does not fit the depth",
            where=where,
            expected=f"{view.num_layers} entries, one per layer",
            got=f"{len(kinds)} entries",
        )
    if view.family is None or "quantization_config" in config:  # packed tensors have other shapes
        return
    rows, columns = _matrix_sizes(sizes)
    for role, name in ((r, n) for layer in view.layers for r, n in layer.items()):
        spec = view.spec(role)
        if spec is not None and spec.in_space is not None and spec.out_space is not None:
            _check_shape(name, shapes[name], (rows.get(spec.out_space), columns.get(spec.in_space)), sizes, where)
    for name in (*view.family.before, *view.family.after):
        if len(shapes.get(name, ())) == 2:
            _check_shape(name, shapes[name], (sizes.get("vocab_size"), columns[RESIDUAL]), sizes, where)


def head_shape(config: Config, view: ModelView) -> Heads | None:
    """The attention heads of a described family; None where the config lacks their numbers or sizes."""
    sizes = section(config, view.layers_path)
    query, size = sizes.get("num_attention_heads"), _head_size(sizes)
    key_value = sizes.get("num_key_value_heads") or query
    if view.family is None or not (_positive(query) and _positive(key_value) and _positive(size)):
        return None
    return Heads(query, key_value, size, view.family.rotary)


def _head_size(sizes: Config) -> Any:
    hidden, queries = sizes.get("hidden_size"), sizes.get("num_attention_heads")
    return sizes.get("head_dim") or (hidden // queries if _positive(hidden) and _positive(queries) else None)


def _matrix_sizes(sizes: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows by out space and columns by in space of a layer's matrices; anything but a positive integer is unknown."""
    queries = sizes.get("num_attention_heads")
    keys = sizes.get("num_key_value_heads") or queries
    head = _head_size(sizes)
    query_rows, key_rows = (n * head if _positive(n) and _positive(head) else None for n in (queries, keys))
    common = {RESIDUAL: sizes.get("hidden_size"), "neurons": sizes.get("intermediate_size")}
    rows = {**common, "query_heads": query_rows, "key_heads": key_rows, "value_heads": key_rows}
    return rows, {**common, "value_heads": query_rows}  # o reads each value head once for every query head


def _positive(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and value > 0


def _check_shape(name: str, shape: tuple[int, ...], wanted: tuple[Any, Any], sizes: Config, where: object) -> None:
    known = [_positive(n) for n in wanted]
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
            hint=f"config.json says {', '.join(f'{k}: {sizes[k]}' for k in keys if sizes.get(k) is not None)}",
        )


def typed_config(config: Config, dtype: str | None) -> dict[str, Any]:
    """A copy of the donor's config.json for the output's dtype.

    Args:
        config: The donor's config.json.
        dtype: A safetensors code; None keeps the config's dtype.
    """
    result = copy.deepcopy(dict(config))
    if dtype is not None:
        holders = [part for part in (result, *_parts(result)) if "dtype" in part or "torch_dtype" in part]
        for part in holders or [result]:
            for key in [k for k in ("dtype", "torch_dtype") if k in part] or ["torch_dtype"]:
                part[key] = dtype_name(dtype)
    return result


def _parts(config: Config) -> list[Any]:
    """The sections of a config that describe parts of the model, such as its vision tower."""
    return [v for k, v in config.items() if k.endswith("_config") and isinstance(v, dict) and "quant" not in k]


def widened_config(config: Config, written: Iterable[str]) -> Config:
    """The config with a dtype that holds all written values, for a recipe that sets no dtype. A bfloat16 model merged
    with a float32 model gives float32 tensors, for example.

    Args:
        config: The output's config.json.
        written: safetensors codes of the computed tensors' float dtypes.
    """
    parts = (config, *_parts(config))
    names = [str(part[key]) for part in parts for key in ("dtype", "torch_dtype") if key in part]  # unchecked values
    declared = next((FLOAT_DTYPES[name] for name in names if name in FLOAT_DTYPES), None)
    if declared is None:
        return config
    wide = promoted([declared, *written])
    return config if wide == declared else typed_config(config, wide)


def deeper_config(
    config: Config, layers_path: Sequence[str], entries: Sequence[LayerEntries], where: object
) -> dict[str, Any]:
    """The donor's config.json for the output's layers.

    Args:
        config: The donor's config.
        layers_path: Keys that lead to its depth, like ``("num_hidden_layers",)``.
        entries: One item per output layer.
        where: The donor, for messages.

    Returns:
        A new config with the output's depth and rebuilt per-layer lists; everything else is unchanged.

    Raises:
        PlanError: the model of a layer lacks one of the donor's per-layer lists; or the config refers to layers by
            index, and the indices change.
    """
    result = copy.deepcopy(dict(config))
    target: dict[str, Any] = dict(section(result, layers_path))
    in_place = len(entries) == target[layers_path[-1]] and [e.layer for e in entries] == list(range(len(entries)))
    for key in (k for k in _LAYER_INDICES if target.get(k) and not in_place):
        raise PlanError(f"config.json's {key} refers to layers by index", where=where, got=target[key])
    for key in layer_lists(config, layers_path):
        target[key] = [_entry(key, source) for source in entries]
    target[layers_path[-1]] = len(entries)
    return with_section(result, layers_path, target)


def config_patch(config: Config, target: Config) -> dict[str, Any]:
    """The JSON merge patch (RFC 7386) that turns ``config`` into ``target``: None means a key to remove."""
    patch: dict[str, object] = {key: None for key in config if key not in target}
    for key, value in target.items():
        ours = config.get(key)
        if isinstance(ours, Mapping) and isinstance(value, Mapping):
            if inner := config_patch(ours, value):
                patch[key] = inner
        elif key not in config or ours != value:
            patch[key] = copy.deepcopy(value)
    return patch


def layer_lists(config: Config, layers_path: Sequence[str]) -> dict[str, list]:
    """Every list with one entry per layer, also one that the config only implies (Qwen2's sliding window)."""
    settings = section(config, layers_path)
    depth = settings[layers_path[-1]]
    lists = {
        key: value
        for key, value in settings.items()
        if isinstance(value, list) and len(value) == depth and not _is_other_list(key)
    }
    first_sliding = settings.get("max_window_layers")
    if settings.get("use_sliding_window") and isinstance(first_sliding, int) and "layer_types" not in lists:
        kinds = ("full_attention", "sliding_attention")
        lists["layer_types"] = [kinds[i >= first_sliding] for i in range(depth)]
    return lists


def _is_other_list(key: str) -> bool:
    return key in (*_NOT_PER_LAYER, *_LAYER_INDICES) or key.endswith(("token_id", "token_ids", "tokens"))


def _entry(key: str, source: LayerEntries) -> Any:
    lists = layer_lists(source.config, source.layers_path)
    if key not in lists:
        raise PlanError(
            f"the model's config.json has no per-layer list {key!r}, which the donor has",
            where=source.model,
            hint="choose a base_model of the same kind",
        )
    return lists[key][source.layer]
