"""How many attention heads a layer has, and how large they are: by config.json, and by shapes where these say it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeGuard

from .built import CannotBuild, resolved_config
from .config_json import Config, section, value_at
from .spec import Heads
from .view import ModelView

#: the keys of one fact in the configs of different families
_QUERY_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_HEADS = (_QUERY_HEADS, _KEY_VALUE_HEADS, ("head_dim",))
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_SHARES = ("partial_rotary_factor", "rotary_pct")
_EXPERT_GROUPS = ("n_group", "num_expert_group")
_ROTARY_SIZES = ("rotary_dim", "rotary_ndims", "qk_rope_head_dim")


def layer_heads(
    config: Config, view: ModelView, layer: int = 0, shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({})
) -> Heads | None:
    """The attention heads of a layer of a described family; None where there are none, or their numbers are unknown.

    Args:
        config: config.json.
        view: The stack that the layer is in.
        layer: Its index.
        shapes: Role -> shape of its tensors. Where q, k or o are tensors of their own, they say how large heads are:
            some models have layers with other heads than config.json's first numbers, or leave these to transformers.
    """
    family, sizes = view.family, with_implied_heads(config, view.layers_path)
    query = _first(sizes, _QUERY_HEADS)
    key_value, size = _key_value_heads(sizes), head_size(sizes)
    if family is None or not positive(query):
        return None

    def rows(role: str, axis: int = 0) -> int | None:
        spec = view.spec(role, layer)
        return shapes[role][axis] if spec and spec.layout is None and len(shapes.get(role, ())) == 2 else None

    if (q := rows("q")) and q % query == 0:
        size = q // query
    elif (o := rows("o", axis=1)) and o % query == 0:
        size = o // query
    if (k := rows("k")) and positive(size) and k % size == 0:
        key_value = k // size
    if not (positive(key_value) and positive(size)):
        return None
    groups = _first(sizes, _EXPERT_GROUPS)
    rotary_size, value_size = _rotary_size(sizes, size, family.rotary_share), None
    if positive(latent := sizes.get("qk_nope_head_dim")):  # latent attention: each query head has its keys and values
        key_value, size, value_size = query, latent, sizes.get("v_head_dim")
        rotary_size = sizes.get("qk_rope_head_dim")
    return Heads(
        query,
        key_value,
        size,
        family.rotary,
        rotary_size,
        family.interleaved,
        frozenset(family.without),
        groups if positive(groups) else 1,
        value_size if positive(value_size) else None,
    )


def with_implied_heads(config: Config, layers_path: Sequence[str]) -> Config:
    """The section of a config that describes a stack, with the numbers of heads and their size that it leaves to
    transformers' class: the text parts of published vision-language models often do.

    Args:
        config: config.json.
        layers_path: Keys that lead to the stack's depth.
    """
    sizes = section(config, layers_path)
    if len(layers_path) < 2 or all(_first(sizes, keys) is not None for keys in _HEADS):
        return sizes
    return _completed(json.dumps(config), tuple(layers_path))


@functools.lru_cache(maxsize=16)
def _completed(config_text: str, layers_path: tuple[str, ...]) -> Config:
    config = json.loads(config_text)
    sizes = section(config, layers_path)
    try:
        full = value_at(resolved_config(config).to_dict(), layers_path[:-1]) or {}
    except CannotBuild:
        return sizes
    missing = (key for keys in _HEADS if _first(sizes, keys) is None for key in keys)
    return {**sizes, **{key: full[key] for key in missing if full.get(key) is not None}}


def head_size(sizes: Config) -> Any:
    """Components of a head as the config says or implies; None, or not an integer, where it does not."""
    hidden, queries = _first(sizes, _HIDDEN), _first(sizes, _QUERY_HEADS)
    return sizes.get("head_dim") or (hidden // queries if positive(hidden) and positive(queries) else None)


def stated_count(sizes: Config, keys: Sequence[str]) -> int | None:
    """A number of things that a config says under one of these keys, the first that it has; None without one.

    Args:
        sizes: The section of the config that describes a stack.
        keys: The keys of one fact; a list of numbers, one for each layer, counts as its largest.
    """
    value = _first(sizes, tuple(keys))
    if isinstance(value, list):
        value = max(filter(positive, value), default=None)
    return value if positive(value) else None


def hidden_size(sizes: Config) -> int | None:
    """The size of the residual stream, d, as the config says it."""
    return stated_count(sizes, _HIDDEN)


def positive(value: object) -> TypeGuard[int]:
    """Whether this value of a config is a number of things."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _key_value_heads(sizes: Config) -> Any:
    """As in the config; with ``multi_query`` one for all. Falcon's new layers have as many as the config says."""
    old_falcon = "new_decoder_architecture" in sizes and not sizes["new_decoder_architecture"]
    if old_falcon or ("multi_query" in sizes and "new_decoder_architecture" not in sizes):
        return 1 if sizes.get("multi_query", True) else _first(sizes, _QUERY_HEADS)
    return _first(sizes, _KEY_VALUE_HEADS) or _first(sizes, _QUERY_HEADS)


def _rotary_size(sizes: Config, size: int, share: float) -> int | None:
    """How many components of a head are rotary; None for all of them."""
    if positive(count := _first(sizes, _ROTARY_SIZES)):
        return count if count < size else None
    stated = _first(sizes, _SHARES)
    if stated is None:
        stated = next((v for key in _SHARES if (v := value_at(sizes, ("rope_parameters", key))) is not None), share)
    rotary = int(size * stated) if isinstance(stated, int | float) and not isinstance(stated, bool) else size
    return rotary if 0 < rotary < size else None


def _first(sizes: Config, keys: tuple[str, ...]) -> Any:
    return next((sizes[key] for key in keys if sizes.get(key) is not None), None)
