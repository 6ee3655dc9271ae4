"""A model's config made small: few heads, narrow, few experts, few tokens, and as many layers as it takes to have every
kind of layer. Sizes are chosen by the names of the keys; whether the result can be built and run is for the caller to
try.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .built import build, main_stack
from .layer_description import config_lists, describe_stack
from .stacks import DEPTH_KEYS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HIDDEN = 64
VOCABULARY = 96
POSITIONS = 128
_DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24)
_HEADS, _KEY_VALUE_HEADS, _MAMBA_HEADS = 4, 2, 8
_EXPERTS = 4

#: keys that place layers, and others that no size depends on
_KEPT = re.compile(
    r".*(layers?|interval|period|offset|_step|_freq|kernel_dim|kernel_size|d_conv|conv_kernel|expand|_L_cache)$"
    r"|first_k_dense_replace|conv_L_cache|altup_.*|num_nextn.*|tp_|hc_.*|.*_mult"
)
_TOKEN = re.compile(r".*(token_id|token_index|token_ids)s?$|.*_tokens?$")
#: a key -> its size in a small model, the first that fits; `None`: as it is
_SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*|n_vocab", VOCABULARY),
    (r"(original_)?max_position_embeddings|n_positions|n_ctx|context_length", POSITIONS),
    (r"max_len|(max_)?seq(uence)?_len(gth)?", POSITIONS),
    (r".*window(_size)?|attention_chunk_size|.*chunk_size", 8),
    (r".*index_topk|index_top_k", 4),
    (r"index_head_dim", 16),
    (r"index_n_heads", 2),
    (r"topk_group|moe_topk_group", 1),
    (r"n_group|moe_n_group|num_expert_group|expert_group", 2),
    (r".*(experts_per_tok(en)?|top_?k(_experts)?|selected_experts|activated_experts|moe_k)", 2),
    (r".*shared_experts?", 1),
    (r".*experts?(_num)?", _EXPERTS),
    (r".*(mamba|ssm).*heads", _MAMBA_HEADS),
    (r"n_groups|.*mamba_n_groups|.*ssm_groups?|mamba_ngroups", 2),
    (r".*(state_size|d_state|ssm_state.*)", 8),
    (r".*d_ssm", 2 * HIDDEN),
    (r".*(linear_num_key_heads)", 2),
    (r".*(linear_num_value_heads)", 4),
    (r".*(key_value_heads|kv_heads|n_head_kv|num_kv.*heads|multi_query_group_num|num_query_groups|kv_n_heads)", 2),
    (r".*heads?", _HEADS),
    (r"hidden_size_per_layer_input|.*per_layer_input.*", 8),
    (r"(hidden_size|d_model|n_embd|n_embed|dim|embed_dim|model_dim|embedding_dim|embedding_size|hidden_dim)", HIDDEN),
    (r"word_embed_proj_dim|lru_width|.*token_embed.*dim", HIDDEN),
    (r"q_lora_rank", 24),
    (r".*rank", 16),
    (r".*(moe|expert).*(intermediate|ffn|hidden|inner).*", 40),
    (r".*latent_size", 32),
    (r".*(intermediate|ffn|inner|d_ff|mlp_dim|mlp_hidden).*", 104),
)  # fmt: skip
_HEAD_SIZE = re.compile(
    r".*(head_dim|head_size|d_head|dim_head|headdim|kv_channels|qk_.*dim|v_head_dim|head_features)s?$"
)
_UNUSED = {"dtype", "torch_dtype", "quantization_config", "id2label", "label2id", "architectures", "auto_map"}
_SCALINGS = {"linear", "dynamic", "yarn", "longrope", "llama3", "su"}


@dataclass(frozen=True)
class _Style:
    """How large heads are.

    Attributes:
        head: The size of a head.
        mamba_head: The size of a head of a state space model.
    """

    head: int
    mamba_head: int = 2 * HIDDEN // _MAMBA_HEADS


#: heads as wide together as the hidden size; half as wide, which tells both apart where a family allows it
_STYLES = (_Style(8), _Style(16))


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the text stack: the config itself, or its part of that name."""
    return config if config.is_encoder_decoder else config.get_text_config(decoder=True)


def narrow_configs(config: PreTrainedConfig, depth: int) -> Iterator[PreTrainedConfig]:
    """Configs of the same depth and kinds of layers, with small sizes; several, to be tried in turn.

    Args:
        config: As transformers reads it.
        depth: Of the stack that is looked at.
    """
    lists = config_lists(config, depth)
    for values in _values(config):
        full = {key: value for key, value in values.items() if key not in _UNUSED}
        for style in _STYLES:
            try:
                small = {key: _small(key, value, full, style, lists) for key, value in full.items()}
                yield type(config).from_dict(small)
            except Exception:  # this style does not suit the family
                continue


def short_config(config: PreTrainedConfig, layer_prefix: str) -> PreTrainedConfig:
    """The config with as few layers as have every kind of its layers; the same if there is no shorter one.

    Args:
        config: From `narrow_configs`.
        layer_prefix: As in `structures`.
    """
    wanted = structures(config, layer_prefix)
    depth = len(wanted)
    for shorter in (n for n in _DEPTHS if n < depth):
        try:
            cut = ((c, structures(c, layer_prefix)) for c in _cut(config, depth, shorter))
            candidate, found = next(pair for pair in cut if len(pair[1]) == shorter)
            if set(found) == set(wanted):
                return candidate
        except Exception:  # the family forbids this depth
            continue
    return config


def structures(config: PreTrainedConfig, layer_prefix: str = "") -> tuple[tuple, ...]:
    """For each layer, a value that is equal for layers of the same structure: classes, shapes, flags; no numbers.

    Args:
        config: As transformers reads it.
        layer_prefix: The prefix of a layer's tensor names with ``{layer}``; without one, of the text stack.

    Raises:
        CannotBuild: transformers cannot build it.
    """
    model = build(config, language_model=True)
    layers = describe_stack(model, main_stack(model, layer_prefix))
    return tuple(
        tuple(sorted((k, repr(v)) for k, v in layer.parts.items() if isinstance(v, (str, bool, tuple, type(None)))))
        for layer in layers
    )


def _cut(config: PreTrainedConfig, depth: int, shorter: int) -> Iterator[PreTrainedConfig]:
    """The config of the first layers, and of as many of any other stack of this depth."""
    lists = config_lists(config, depth)
    for values in _values(config):
        for key, value in values.items():
            if key in lists:
                values[key] = list(value)[:shorter]
            elif type(value) is int and value == depth and re.search("layer|block", key):
                values[key] = shorter
        yield type(config).from_dict(values)


def _values(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """A config's values: without those that its class works out from others, and with them."""
    every = config.to_dict()
    declared = getattr(type(config), "__dataclass_fields__", every).keys() | {"model_type"}
    return [{k: v for k, v in every.items() if k in declared}, every]


def _small(key: str, value: Any, full: Mapping[str, Any], style: _Style, lists: Mapping[str, object]) -> Any:
    """The value of a key in a small model."""
    if value is None or isinstance(value, (bool, float)):
        return value
    if key in lists and not (isinstance(value, list) and all(type(v) is int and v > HIDDEN for v in value)):
        return value
    if _TOKEN.fullmatch(key):
        return _small_token(value)
    if key in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
        return _plain_rope(value, style, bool(re.search(r"vl|omni", str(full.get("model_type")))))
    if isinstance(value, Mapping):
        return {k: _small(str(k), v, value, style, {}) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        sizes = bool(value) and all(type(v) is int and v > 8 for v in value)
        return [_small(key.rstrip("s"), v, full, style, {}) for v in value] if sizes else value
    if isinstance(value, str) or not isinstance(value, int):
        return value
    return _small_size(key, value, full, style)


def _small_size(key: str, value: int, full: Mapping[str, Any], style: _Style) -> int:
    if value <= 0 or key in DEPTH_KEYS or _KEPT.fullmatch(key):
        return value
    if key in ("num_heads", "n_heads") and "state_size" in full:  # mamba2's own names
        return _MAMBA_HEADS
    if key == "attention_hidden_size":
        return HIDDEN * value // int(full.get("hidden_size", value))
    if re.fullmatch(r"rotary_dim|rotary_ndims", key):
        return style.head // 2
    if _HEAD_SIZE.fullmatch(key):
        return _small_head(key, value, full, style)
    size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, key)), None)
    if size is None:
        return 32 if value > HIDDEN and re.search(r"size|dim|width|channels", key) else value
    if re.fullmatch(r".*heads?|n_groups|num_kv.*", key) and value == 1:
        return 1
    if size == _KEY_VALUE_HEADS and "heads" in key and value == full.get("num_attention_heads"):
        return _HEADS
    if size == _MAMBA_HEADS or re.fullmatch(
        r".*head.*|.*intermediate.*|.*rank|hidden_size|d_model|.*vocab_size|.*d_ssm", key
    ):
        return size
    return min(value, size)


def _small_head(key: str, value: int, full: Mapping[str, Any], style: _Style) -> int:
    if re.search(r"mamba|ssm", key) or (key == "head_dim" and "state_size" in full):
        return style.mamba_head
    if key == "attention_head_dim" and "attention_hidden_size" in full:
        return HIDDEN * int(full["attention_hidden_size"]) // int(full.get("hidden_size", HIDDEN)) // _HEADS
    if key.startswith("global_"):
        return 2 * style.head if value != full.get("head_dim") else style.head
    if key == "head_dim" and "qk_rope_head_dim" in full:
        return style.head if value == full["qk_rope_head_dim"] else 2 * style.head
    if key == "qk_head_dim":
        return 2 * style.head
    return style.head


def _small_token(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_small_token(v) for v in value[:1]]
    return min(value, 2) if isinstance(value, int) else value


def _plain_rope(value: Mapping[str, Any], style: _Style, seen: bool) -> dict[str, Any]:
    """Rotary embeddings without a scaling to long contexts, whose factors depend on sizes; of models that see, too."""
    if any(isinstance(v, Mapping) for v in value.values()):  # one for each type of layer
        return {k: _plain_rope(v, style, seen) if isinstance(v, Mapping) else v for k, v in value.items()}
    kept = {k: v for k, v in value.items() if k in ("rope_theta", "partial_rotary_factor")}
    kind = value.get("rope_type", value.get("type", "default"))
    if seen or "mrope_section" in value:
        half = int(style.head * value.get("partial_rotary_factor", 1.0)) // 2
        kept["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return {**kept, "rope_type": "default" if kind in _SCALINGS or kind == "mrope" else kind}
