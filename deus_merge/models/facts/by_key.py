"""The rules that hold for a key of config.json in any model, and the keys that say nothing about single layers."""

from __future__ import annotations

import re
from typing import Any

from .base import Rule, Scope
from .forms import Count, Every, Given, Listed, Period
from .numbers import Marks, Numbers
from .special import ByNumber, Cycle, Groups, Letters, Span, SparseStep
from .ties import OverRootDepth, Pin, Shared, Sources

FULL, SLIDING, LINEAR, INDEXED = "full_attention", "sliding_attention", "linear_attention", "indexed_attention"

#: lists with one entry a layer
_LISTS = (
    "layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "layer_rope_theta", "hybrid_layer_pattern",
    "num_attention_heads_per_layer", "num_key_value_heads_per_layer", "activation_sparsity_pattern", "attention_layers",
    "num_query_heads", "num_kv_heads", "ffn_multipliers", "block_configs", "intermediate_size", "attn_type_list",
    "moe_layer_freq", "attn_layers", "attention_window", "num_key_value_heads", "layers_types",
)  # fmt: skip
#: lists that may have entries for prediction layers, too
_LISTS_WITH_TAIL = ("compress_ratios", "swiglu_limits", "swiglu_limits_shared")
#: lists of layer numbers
_NUMBERS = (
    "moe_layers", "full_attn_idxs", "attn_layer_indices", "cross_attention_layers", "fullatt_block_indexes",
    "rope_scaling_layers", "local_layer_ids", "global_attn_indexes", "mlp_only_layers_list",
)  # fmt: skip
#: numbers that belong to entries of something else
_MARKS = ("deepstack_visual_indexes", "ple_layer_ids", "insert_layer_id")
#: k: every k-th layer is of another kind
_EVERY = (
    "sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval", "no_rope_layer_interval",
    "global_attn_every_n_layers", "interleave_moe_layer_step", "layer_group_size", "moe_layer_freq",
)  # fmt: skip
#: k: the first k layers are of another kind
_COUNTS = ("first_k_dense_replace", "num_dense_layers", "num_hash_layers", "dense_mlp_idx")


def all_layers(key: str, *harmless: Any, default: Any = None) -> Any:
    """For a `Pin`: all layers where a key holds something else than null, false, zero and these values."""

    def tied(scope: Scope) -> list[bool] | None:
        value = scope.get(key, default)
        return None if not value or value in harmless else [True] * scope.depth

    return tied


def pinned(key: str, reason: str, *harmless: Any, default: Any = None, by_depth: bool = True) -> Rule:
    """A rule for a key that ties all layers to their places."""
    return Rule(key, (Pin(key, reason, all_layers(key, *harmless, default=default), by_depth=by_depth),))


def _uses_window(scope: Scope) -> bool:
    return bool(scope.section.get("use_sliding_window"))


BY_KEY: tuple[Rule, ...] = (
    *(Rule(key, (Listed(key),)) for key in _LISTS),
    *(Rule(key, (Listed(key, tail=True),)) for key in _LISTS_WITH_TAIL),
    *(Rule(key, (Numbers(key),)) for key in _NUMBERS),
    *(Rule(key, (Marks(key),)) for key in _MARKS),
    *(Rule(f"{key} (number)", (Given(Every(key, "at the interval", "between")),)) for key in _EVERY),
    *(Rule(key, (Given(Count(key, "first", "later")),)) for key in _COUNTS),
    Rule("sliding_window_pattern (cycle)", (
        Given(Cycle("sliding_window_pattern", letters={"L": SLIDING, "G": FULL})),)),
    Rule("block_types", (Cycle("block_types"),)),
    Rule("max_window_layers", (Given(Count("max_window_layers", FULL, SLIDING, when=_uses_window)),)),
    Rule("mlp_only_layers", (Given(SparseStep()),)),
    Rule("attn_layer_period", (Given(Period("attn_layer_period", "attn_layer_offset", "attention", "mixer", (1, 0))),)),
    Rule("expert_layer_period", (
        Given(Period("expert_layer_period", "expert_layer_offset", "sparse", "dense", (1, 0))),)),
    Rule("moe_layer_start_index", (Given(Span()),)),
    Rule("hybrid_override_pattern", (
        Letters("hybrid_override_pattern", {"M": LINEAR, "E": "moe", "*": FULL, "-": "mlp"}),)),
    Rule("per_layer_config", (ByNumber("per_layer_config"),)),
    Rule("attention_types", (Groups("attention_types"),)),
    Rule("indexer_types", (Shared(Listed("indexer_types")),)),
    Rule("kv_source_layers", (Sources("kv_source_layers"),)),
    Rule("scale_depth", (OverRootDepth("scale_depth"),)),
    pinned("scale_attn_by_inverse_layer_idx", "scales the attention of each layer by its number", by_depth=False),
    pinned("num_kv_shared_layers", "lets the last layers use keys and values of layers before them"),
    pinned("hidden_size_per_layer_input", "gives each layer a part of a matrix outside of the layers"),
    pinned("n_layers_per_attn_res_block", "joins neighbouring layers to blocks"),
    pinned("cross_layer_interval", "puts layers of another stack between the layers"),
    pinned("num_mem_blocks", "shares tensors between layers"),
    pinned("use_cla", "lets layers use keys and values of layers before them"),
)  # fmt: skip

#: words in the names of keys that may speak about layers
SUSPECT = re.compile(
    r"(?:^|_)(?:layers?|patterns?|intervals?|freqs?|periods?|offsets?|steps?|indices|indexes|index|idxs?|ids|blocks?|every"
    r"|cycles?|sparsity|stride)(?:_|$)"
)
#: keys that say nothing about single layers, though their names or values look like it
HARMLESS = re.compile(
    r"architectures|mrope_section|sizes|feature_size|id2label|label2id|torch_dtype|dtype|auto_map|rope_scaling"
    r"|rope_parameters|quantization_config|vision_config|text_config|audio_config|.*_config|.*token_ids?|.*tokens|.*_token"
    r"|.*layer_?norm.*|.*_norm|.*layerdrop|num_hidden_layers|num_blocks|n_layers?|num_layers|num_nextn_predict_layers|num_mtp_layers"
    r"|mtp_.*|num_experts_per_(?:tok|token|layer)|vision_feature_layers?|time_step_.*|rescale_every|max_window_layers"
    r"|(?:encoder|decoder)_layers|num_(?:encoder|decoder)_layers|layer_scale_.*|index_(?:topk|head_dim|n_heads|block_size"
    r"|topk_blocks|local_blocks)|block_(?:size|multiple_of|ffn_dim_multiplier|auto_adjust_ff_dim|ff_dim|dim)"
    r"|num_random_blocks|vocab_size_per_layer_input|altup_.*|num_gpus|.*_dropout|axial_.*|.*position.*|transformers_version"
    r"|conv_.*|patch_size|image_size|window_size|global_block_size|summary_.*|gradient_.*|layer_types_.*|global_attn_step"
    r"|(?:mask|unk|bos|eos|pad)_index|pruned_heads|task_specific_params|suppress_.*|keys_to_ignore_at_inference"
    r"|image_grid_pinpoints|tie_.*"
)


def looks_like_layers(key: str, value: Any, depth: int) -> bool:
    """Whether a key that no rule reads may say something about single layers.

    Args:
        key: A key of the section that holds the depth.
        value: Its value.
        depth: The number of layers.
    """
    if HARMLESS.fullmatch(key) or value is None or isinstance(value, (bool, float)):
        return False
    if isinstance(value, int):
        return abs(value) > 1 and SUSPECT.search(key) is not None
    if isinstance(value, str):
        return len(value) == depth and SUSPECT.search(key) is not None
    if isinstance(value, list):
        numbers = bool(value) and all(type(v) is int and 0 <= v <= depth for v in value)
        return (depth > 0 and len(value) == depth) or numbers or (bool(value) and SUSPECT.search(key) is not None)
    if isinstance(value, dict):
        return bool(value) and all(str(k).isdecimal() and int(k) <= depth for k in value)
    return False
