"""config.json: checked against the tensors, and rewritten for another depth or dtype."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import ArchitectureError, PlanError
from ..core.units import FLOAT_DTYPES, dtype_name, promoted
from .config_json import Config, section
from .facts import quantization
from .head_layout import head_size, positive, with_implied_heads
from .layer_facts import LayerFacts, contract, expand, of_new_layer
from .spec import RESIDUAL
from .view import ModelView


@dataclass(frozen=True)
class LayerEntries:
    """The source layer whose facts in config.json an output layer takes: for a fused layer, its upper neighbour.

    Attributes:
        config: The config.json of the source layer's model.
        layer: The source layer's index.
        model: The model's name, for messages.
        layers_path: Keys that lead to the model's depth.
        new: Whether the output's layer is new, and not one that the model has.
    """

    config: Config
    layer: int
    model: str
    layers_path: Sequence[str]
    new: bool = False


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
    if view.family is None:
        return
    sizes = with_implied_heads(config, view.layers_path)
    rows, columns = _matrix_sizes(sizes, view.family.unchecked)
    for i, role, name in ((i, r, n) for i, layer in enumerate(view.layers) for r, n in layer.items()):
        spec = view.spec(role, i)
        if spec is None or spec.layout is not None or name not in shapes:
            continue
        if None not in (spec.in_space, spec.out_space):
            _check_shape(
                name, shapes[name], (rows.get(spec.out_space or ""), columns.get(spec.in_space or "")), sizes, where
            )
    for name in (*view.family.before[:1], *view.family.tied):  # token embeddings and head
        if len(shapes.get(name, ())) == 2:
            _check_shape(name, shapes[name], (sizes.get("vocab_size"), columns.get(RESIDUAL)), sizes, where)


def _matrix_sizes(sizes: Config, unchecked: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows by out space and columns by in space of a layer's matrices; anything but a positive integer is unknown.
    Nothing is said about ``unchecked`` spaces."""
    queries = sizes.get("num_attention_heads")
    keys = sizes.get("num_key_value_heads") or queries
    head = head_size(sizes)
    query_rows, key_rows = (n * head if positive(n) and positive(head) else None for n in (queries, keys))
    common = {RESIDUAL: sizes.get("hidden_size"), "neurons": sizes.get("intermediate_size")}
    rows = {**common, "query_heads": query_rows, "key_heads": key_rows, "value_heads": key_rows}
    columns = {**common, "value_heads": query_rows}  # o reads each value head once for every query head
    known = [{s: n for s, n in side.items() if s not in unchecked} for side in (rows, columns)]
    return known[0], known[1]


def _check_shape(name: str, shape: tuple[int, ...], wanted: tuple[Any, Any], sizes: Config, where: object) -> None:
    known = [positive(n) for n in wanted]
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
        A new config with the output's depth that says of each layer what its own config says; everything else is
        unchanged.

    Raises:
        PlanError: the config cannot say it, or the config of a layer's model lacks something that the donor's says.
    """
    model_type = str(config.get("model_type"))
    known: dict[tuple[int, tuple[str, ...]], list[LayerFacts]] = {}
    own, facts = expand(config, layers_path, model_type), []
    for entry in entries:
        key = id(entry.config), tuple(entry.layers_path)
        if key not in known:
            known[key] = expand(entry.config, entry.layers_path, str(entry.config.get("model_type")))
            known[key] = [_as_quantized(own[0] if own else {}, layer) for layer in known[key]]
            _check_like_donor(own, known[key], entry.model)
        found = known[key][entry.layer]
        facts.append(of_new_layer(found, entry.layer) if entry.new else found)
    return contract(config, layers_path, model_type, facts, where)


def _as_quantized(donor: LayerFacts, layer: LayerFacts) -> LayerFacts:
    """The facts of a layer where one of both models is not quantised, or excepts no layer by its number."""
    kept = {name: value for name, value in layer.items() if name != quantization.FACT or name in donor}
    return {quantization.FACT: (), **kept} if quantization.FACT in donor else kept


def _check_like_donor(own: Sequence[LayerFacts], facts: Sequence[LayerFacts], model: str) -> None:
    """Check that two configs say the same facts of their layers, or that one says nothing about single layers."""
    hint = "choose a base_model of the same kind"
    for name in (name for name in own[0] if name not in facts[0]) if own and facts else ():
        raise PlanError(f"the model's config.json has no {name!r}, which the donor has", where=model, hint=hint)
    for name in (name for name in facts[0] if name not in own[0]) if own and facts else ():
        if any(layer[name] != facts[0][name] for layer in facts):
            raise PlanError(f"the donor's config.json has no {name!r}, which the model has", where=model, hint=hint)


def cache_warnings(config: Config, donor: Config) -> list[str]:
    """What to know about the output's use, where the decoder of a T5 became deeper than its encoder.

    Args:
        config: The output's config.json.
        donor: The donor's.
    """
    decoder, encoder = config.get("num_decoder_layers"), config.get("num_layers")
    grew = decoder != donor.get("num_decoder_layers")
    if not grew or not positive(decoder) or not positive(encoder) or decoder <= encoder:
        return []
    return [
        f"config.json: num_decoder_layers is {decoder}, num_layers {encoder}: transformers makes the cache of"
        " generate() as deep as num_layers; call it with use_cache=False, or let the encoder grow as much"
    ]


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
