"""The rules of single families, by ``model_type``: which key wins, and what a config implies that lacks them all.

Reference: the configuration classes of transformers 5.23; tests compare every rule with the models that it builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Form, Rule, Scope
from .by_key import FULL, INDEXED, LINEAR, SLIDING, pinned
from .defaults import (
    beam_types,
    cohere2_moe_types,
    deepseek_v4_types,
    deepstack,
    dots3_types,
    flint_types,
    from_the_end,
    linear_layers,
    moe_numbers,
    olmo_hybrid_types,
    one_window,
    qwen2_moe_types,
    some_hybrid,
    topk_types,
)
from .forms import Count, Every, Implied, Listed, Period
from .numbers import Marks, Numbers, Parts
from .special import (
    ByNumber,
    Cycle,
    Groups,
    Letters,
    Span,
    SparseStep,
)
from .ties import First, OverRootDepth, Pin, Shared, Sources


def layer_types(*forms: Form, last: Any = None) -> Rule:
    """``layer_types``: the list, or else one of these forms."""
    return Rule("layer_types", (Listed("layer_types"), *forms), last)


def mlp_types(*forms: Form) -> Rule:
    """``mlp_layer_types``: the list, or else one of these forms."""
    return Rule("mlp_layer_types", (Listed("mlp_layer_types"), *forms))


def dense_first(key: str | None, default: int | None, **more: Any) -> Count:
    """The first layers without experts."""
    return Count(key, "dense", "sparse", default, **more)


def by_index(values: Any) -> Implied:
    """Values that depend on a layer's number alone."""
    return Implied(lambda scope: [values(i) for i in range(scope.depth)])


def _windows(default: int) -> Rule:
    """Qwen2: full attention in the first ``max_window_layers`` layers."""

    def used(scope: Scope) -> bool:
        return bool(scope.section.get("use_sliding_window")) and scope.section.get("sliding_window", 4096) is not None

    return layer_types(Count("max_window_layers", FULL, SLIDING, default, when=used))


def _muse_theta(default: float) -> Rule:
    def values(scope: Scope) -> list[float]:
        theta = (scope.section.get("rope_parameters") or {}).get("rope_theta", scope.get("rope_theta", default))
        return [0 if kind == FULL else theta for kind in from_the_end(scope)]

    return Rule("layer_rope_theta", (Listed("layer_rope_theta"), Implied(values)))


def _indexers(default: Form) -> Rule:
    """Which layers select positions themselves, and which reuse the selection of a layer before them."""
    letters = Letters("index_topk_pattern", {"F": "full", "S": "shared"})
    return Rule("indexer_types", (Shared(Listed("indexer_types")), Shared(letters), Shared(default)))


_TOPK = _indexers(Implied(topk_types, read_keys=("index_topk_freq", "index_skip_topk_offset")))


_SHARED_BLOCKS = Pin("layers_block_type", "puts tensors that several layers share into the first of them", some_hybrid)
_NO_ROPE = Rule("no_rope_layers", (Listed("no_rope_layers"), Every("no_rope_layer_interval", 0, 1, 4)))
_SPARSE = Rule("mlp_only_layers", (SparseStep(),))
_PARTS = Parts(
    {FULL: ("linear_attn_config", "full_attn_layers"), LINEAR: ("linear_attn_config", "kda_layers")}, first=1
)
_INPUTS = "gives each layer a part of a matrix outside of the layers"
_REUSE = "lets the last layers use keys and values of layers before them"
_GEMMA4 = (
    layer_types(Every(None, FULL, SLIDING, 6), last=FULL),
    Rule("per_layer_config", (ByNumber("per_layer_config"),)),
    pinned("num_kv_shared_layers", _REUSE),
)
_WINDOW_EVERY_2 = layer_types(
    Every(None, FULL, SLIDING, 2), Every("sliding_window_pattern", FULL, SLIDING, mirror=True)
)
_WINDOW_EVERY_4 = layer_types(
    Every("sliding_window_pattern", FULL, SLIDING, 4), Every("layer_switch", FULL, SLIDING, mirror=True)
)
_EXAONE = layer_types(
    Every("sliding_window_pattern", FULL, SLIDING, 4),
    Cycle("sliding_window_pattern", letters={"L": SLIDING, "G": FULL}),
)
_QWEN_LINEAR = layer_types(Every("full_attention_interval", FULL, LINEAR, 4))
_FULL_FIRST_OF_4 = layer_types(Every(None, FULL, SLIDING, 4, shift=-1))
_INDEXED = layer_types(by_index(lambda i: INDEXED))
_MIXERS = {"M": LINEAR, "E": "moe", "*": FULL, "-": "mlp"}
_RATIOS = {0: SLIDING, 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}

#: the rules of single families; they come before those by key
IMPLIED: Mapping[str, tuple[Rule, ...]] = {
    "afmoe": (
        layer_types(Every("global_attn_every_n_layers", FULL, SLIDING, 4)),
        Rule("num_dense_layers", (dense_first("num_dense_layers", 1),)),
    ),
    "axk1": (mlp_types(dense_first("first_k_dense_replace", 1, every="moe_layer_freq")),),
    "axk2": (_INDEXED, mlp_types(dense_first("first_k_dense_replace", 1, every="moe_layer_freq")),),
    "bailing_hybrid": (
        layer_types(Every("layer_group_size", FULL, LINEAR, 6)),
        mlp_types(dense_first("first_k_dense_replace", 2)),
    ),
    "bamba": (Rule("attn_layer_indices", (Numbers("attn_layer_indices", FULL, LINEAR, default=lambda n: ()),)),),
    "beam": (
        layer_types(Implied(beam_types)),
        mlp_types(dense_first(None, 3)),
        Rule("model_type", (Pin("model_type", "joins layers by their numbers", lambda s: [True] * s.depth),)),
    ),
    "cohere2": (_WINDOW_EVERY_4,),
    "cohere2_moe": (
        layer_types(
            Implied(cohere2_moe_types, ("sliding_window_pattern", "prefix_dense_sliding_window_pattern"),
                    ("first_k_dense_replace",))
        ),
        mlp_types(dense_first("first_k_dense_replace", 0)),
    ),
    "cohere_compass_text": (Rule("deepstack", (First("deepstack_visual_indexes", deepstack),)),),
    "cwm": (_FULL_FIRST_OF_4,),
    "deepseek_v2": (Rule("first_k_dense_replace", (dense_first("first_k_dense_replace", 0),)),),
    "deepseek_v3": (Rule("first_k_dense_replace", (dense_first("first_k_dense_replace", 3),)),),
    "deepseek_v32": (_INDEXED, mlp_types(dense_first("first_k_dense_replace", 3)),),
    "deepseek_v4": (
        Rule("layer_types", (
            Listed("layer_types", tail=True), Listed("compress_ratios", _RATIOS, tail=True),
            Implied(deepseek_v4_types),
        )),
        Rule("mlp_layer_types", (
            Listed("mlp_layer_types", tail=True), Count("num_hash_layers", "hash_moe", "moe", 3),
        )),
    ),
    "diffllama": (
        Rule("model_type", (
            Pin("model_type", "scales the attention of each layer by its number", lambda s: [True] * s.depth,
                by_depth=False),
        )),
    ),
    "diffusion_gemma_text": _GEMMA4,
    "dots1": (
        layer_types(Count("max_window_layers", FULL, SLIDING, 62,
                          when=lambda s: s.section.get("sliding_window", 4096) is not None)),
        Rule("first_k_dense_replace", (dense_first("first_k_dense_replace", 0),)),
    ),
    "dots3_note_text": (
        layer_types(Implied(dots3_types, ("use_sliding_window",), ("use_dsa",))),
        mlp_types(Listed("moe_layer_freq", {0: "dense", 1: "sparse"}),
                  dense_first("first_k_dense_replace", 1, every="moe_layer_freq")),
    ),
    "ernie4_5_moe": (Rule("moe_layer_start_index", (Span(),)),),
    "ernie4_5_vl_moe_text": (mlp_types(dense_first(None, 1)),),
    "evolla": (pinned("aligner_num_add_layers", "puts other blocks between the layers", default=8),),
    "exaone4": (_EXAONE,),
    "exaone_moe": (_EXAONE, mlp_types(dense_first("first_k_dense_replace", 1))),
    "flint": (layer_types(Implied(flint_types)), Rule("mlp_only_layers", (SparseStep(default=(0, 1)),))),
    "gemma2": (_WINDOW_EVERY_2,),
    "gemma3_text": (
        layer_types(Every("sliding_window_pattern", FULL, SLIDING, 6),
                    Every("_sliding_window_pattern", FULL, SLIDING, mirror=True)),
    ),
    "gemma3n_text": (
        layer_types(Every(None, FULL, SLIDING, 5)),
        pinned("num_kv_shared_layers", _REUSE, default=15),
        pinned("hidden_size_per_layer_input", _INPUTS, default=256),
    ),
    "gemma4_text": (*_GEMMA4, pinned("hidden_size_per_layer_input", _INPUTS, default=256)),
    "gemma4_unified_text": _GEMMA4,
    "glm4_moe": (Rule("first_k_dense_replace", (dense_first("first_k_dense_replace", 1),)),),
    "glm4v_moe_text": (Rule("first_k_dense_replace", (dense_first("first_k_dense_replace", 1),)),),
    "glm4_moe_lite": (mlp_types(dense_first(None, 1)),),
    "glm5_next_text": (
        layer_types(by_index(lambda i: INDEXED if i % 4 == 3 else LINEAR)), mlp_types(dense_first(None, 3)), _TOPK,
    ),
    "glm_moe_dsa": (_INDEXED, mlp_types(dense_first("first_k_dense_replace", 3)), _TOPK),
    "gpt_neo": (
        Rule("attention_layers", (Groups("attention_types", [[["global", "local"], 12]]),
                                  Listed("attention_layers", mirror=True))),
    ),
    "gpt_oss": (_WINDOW_EVERY_2,),
    "granite_swa": (_FULL_FIRST_OF_4,),
    "granitemoe_swa": (_FULL_FIRST_OF_4,),
    "granitemoehybrid": (layer_types(Listed("layers_block_type")),),
    "hrm_text": (pinned("model_type", "runs its layers in cycles"),),
    "hunyuan_v1_moe": tuple(
        Rule(key, (Listed(key),)) for key in ("num_experts", "moe_topk", "moe_intermediate_size", "num_shared_expert")
    ),
    "hy_v3": (mlp_types(dense_first(None, 1)),),
    "hy_v4": (
        _INDEXED,
        mlp_types(dense_first(None, 1)),
        _indexers(by_index(lambda i: "full" if i == 0 or (i - 1) % 4 == 0 else "shared")),
    ),
    "idefics": (pinned("cross_layer_interval", "puts layers of another stack between the layers", default=1),),
    "inkling_text": (
        layer_types(Numbers("local_layer_ids", "hybrid_sliding", "hybrid",
                            default=lambda n: [i for i in range(n) if (i + 1) % 6])),
        mlp_types(dense_first("dense_mlp_idx", 0)),
    ),
    "inkling2_text": (
        layer_types(Every(None, "hybrid", "hybrid_sliding", 6)),
        pinned("n_layers_per_attn_res_block", "joins neighbouring layers to blocks", default=6),
    ),
    "jamba": (
        Rule("attn_layer_period", (Period("attn_layer_period", "attn_layer_offset", FULL, LINEAR, (8, 4)),)),
        Rule("expert_layer_period", (Period("expert_layer_period", "expert_layer_offset", "sparse", "dense", (2, 1)),)),
    ),
    "kimi_linear": (
        layer_types(_PARTS, by_index(lambda i: FULL if i and i % 4 == 0 else LINEAR)),
        mlp_types(dense_first("first_k_dense_replace", 1)),
    ),
    "kolibri1": (layer_types(Every(None, FULL, SLIDING, 5)),),
    "laguna": (layer_types(by_index(lambda i: FULL)), mlp_types(dense_first(None, 1)),),
    "lfm2": (layer_types(Numbers("full_attn_idxs", FULL, "conv", default=range)),),
    "lfm2_moe": (Rule("num_dense_layers", (dense_first("num_dense_layers", 2),)),),
    "lfm3": (
        layer_types(by_index(lambda i: FULL if i % 4 == 2 else SLIDING if i % 4 == 0 and i else "conv")),
    ),
    "llama4_text": (
        _NO_ROPE,
        Rule("moe_layers", (Numbers("moe_layers", "sparse", "dense"),
                            Every("interleave_moe_layer_step", "sparse", "dense", 1))),
    ),
    "mimo_v2_flash": (
        layer_types(by_index(lambda i: SLIDING if i and (i + 1) % 6 else FULL)), mlp_types(dense_first(None, 1)),
    ),
    "minicpm3": (Rule("scale_depth", (OverRootDepth("scale_depth", 1.4),)),),
    "mellum": (layer_types(by_index(lambda i: FULL)), mlp_types(by_index(lambda i: "sparse"))),
    "ministral": (layer_types(Implied(one_window)),),
    "minimax": (
        layer_types(Every(None, LINEAR, FULL, 2)),
        Rule("layer_types (decay)", (
            Pin("layer_types", "gives linear attention a decay by number and depth", linear_layers),)),
    ),
    "minimax_m3_vl_text": (
        layer_types(Listed(("sparse_attention_config", "sparse_attention_freq"), {0: FULL, 1: "minimax_m3_sparse"})),
        mlp_types(Listed("moe_layer_freq", {0: "dense", 1: "sparse"})),
    ),
    "mistral4": (Rule("first_k_dense_replace", (dense_first("first_k_dense_replace", 0),)),),
    "mistral_large4_text": (
        _NO_ROPE, mlp_types(dense_first("first_k_dense_replace", 1)), _TOPK,
        Rule("kv_source_layers", (Sources("kv_source_layers"),)),
    ),
    "mllama_text_model": (
        Rule("cross_attention_layers", (
            Numbers("cross_attention_layers", "cross_attention", "self_attention", default=lambda n: range(3, 40, 5)),
        )),
    ),
    "modernbert-decoder": (
        layer_types(Every("global_attn_every_n_layers", FULL, SLIDING, 3, shift=-1)),
        Rule("first layer", (First("model_type", lambda s: 1),)),
    ),
    "molmo2_text": (Rule("rope_scaling_layers", (Numbers("rope_scaling_layers", default=range),)),),
    "muse_glimmer_text": (layer_types(Implied(from_the_end)), _muse_theta(10_000.0)),
    "muse_spark_text": (layer_types(Implied(from_the_end)), _muse_theta(500_000.0)),
    "nemotron_h": (
        Rule("layers_block_type", (
            Listed("layers_block_type"), Listed("layer_types"), Letters("hybrid_override_pattern", _MIXERS),
        )),
    ),
    "olmo3": (
        layer_types(Every(None, FULL, SLIDING, 4), Every("sliding_window_pattern", FULL, SLIDING, mirror=True)),
    ),
    "olmo_hybrid": (layer_types(Implied(olmo_hybrid_types)),),
    "qwen2": (_windows(28),),
    "qwen2_vl_text": (_windows(80),),
    "qwen2_5_vl_text": (_windows(80),),
    "qwen2_5_omni_text": (_windows(28),),
    "qwen2_moe": (
        _SPARSE, layer_types(Implied(qwen2_moe_types, other_keys=("max_window_layers", "use_sliding_window"))),
    ),
    "qwen3": (_windows(28),),
    "qwen3_moe": (_SPARSE,),
    "qwen3_omni_moe_text": (_SPARSE, Rule("deepstack", (First("deepstack_visual_indexes", deepstack),))),
    "qwen3_vl_text": (Rule("deepstack", (First("deepstack_visual_indexes", deepstack),)),),
    "qwen3_vl_moe_text": (_SPARSE, Rule("deepstack", (First("deepstack_visual_indexes", deepstack),))),
    "qwen3_next": (_SPARSE, _QWEN_LINEAR),
    "qwen3_5_text": (_QWEN_LINEAR,),
    "qwen3_5_moe_text": (_QWEN_LINEAR,),
    "qwen4_exp_text": (
        layer_types(Every("full_attention_interval", INDEXED, LINEAR, 4)),
        Rule("ple_layer_ids", (Marks("ple_layer_ids", first=1),)),
    ),
    "recurrent_gemma": (Rule("block_types", (Cycle("block_types", ("recurrent", "recurrent", "attention")),)),),
    "rwkv": (Rule("first layer", (First("model_type", lambda s: 1),)),),
    "smollm3": (_NO_ROPE,),
    "step3p7_text": (
        Rule("layer_types", (Listed("layer_types", tail=True),)),
        Rule("mlp_layer_types", (Listed("mlp_layer_types", tail=True), Implied(moe_numbers, ("moe_layers_enum",)))),
    ),
    "t5gemma2_text": (layer_types(Every("sliding_window_pattern", FULL, SLIDING, 6)),),
    "unlimited_ocr_text": (mlp_types(dense_first("first_k_dense_replace", 1)),),
    "vaultgemma": (_WINDOW_EVERY_2,),
    "zamba": (Rule("layers_block_type", (_SHARED_BLOCKS, Listed("layers_block_type"))),),
    "zamba2": (Rule("layers_block_type", (_SHARED_BLOCKS, Listed("layers_block_type"))),),
    "zaya": (Rule("first layer", (First("model_type", lambda s: 1),)),),
}  # fmt: skip
