"""What a tiny model of each described model type needs in its config, so that all its kinds of layers are there and its
options are on. ``type:name`` is another model of a type."""

from __future__ import annotations

from collections.abc import Mapping

from more_settings import SECOND

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_OLD = {"num_key_value_heads": ..., "head_dim": ...}  # as many key-value heads as query heads
_GPT = {**_OLD, "intermediate_size": ..., "n_embd": 32, "n_layer": 6, "n_head": 4, "n_inner": 48, "n_positions": 128}
_MPT = {
    **_OLD, "intermediate_size": ..., "d_model": 32, "n_layers": 6, "n_heads": 4, "max_seq_len": 128,
    "expansion_ratio": 2,
}  # fmt: skip
_FALCON = {**_OLD, "intermediate_size": ..., "ffn_hidden_size": 48}
_GEMMA4 = {
    "sliding_window": 8, "hidden_size_per_layer_input": 0, "global_head_dim": 16, "num_global_key_value_heads": 1,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}  # fmt: skip
_LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "head_dim": 16, "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
}  # fmt: skip
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_VISION = {"depth": 2, "num_heads": 2, "hidden_size": 16, "intermediate_size": 24, "patch_size": 4,
           "spatial_merge_size": 2, "temporal_patch_size": 1}  # fmt: skip
#: what a model type needs beyond `SMALL` so that all its kinds of layers are there, and its options are on; ``...``
#: for a key that it cannot have
SETTINGS: Mapping[str, Mapping] = {
    **SECOND,
    "apertus": {"attention_bias": True},
    "arcee": {"attention_bias": True, "mlp_bias": True},
    "biogpt": {**_OLD},
    "bloom": {**_OLD, "intermediate_size": ..., "n_layer": 6, "n_head": 4},
    "codegen": {**_GPT, "rotary_dim": 4},
    "cohere": {"use_qk_norm": True},
    "cohere2": {"sliding_window": 8},
    "cwm": {"sliding_window": 8},
    "exaone4": {"sliding_window": 8},
    "falcon": {**_FALCON, "bias": True},
    "falcon:new": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon:one norm": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    "falcon:sequential": {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    "gemma": {"attention_bias": True},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "attention_bias": True},
    "gemma4_text": {**_GEMMA4},
    "gemma4_text:experts": {**_GEMMA4, **_MOE, "enable_moe_block": True, "top_k_experts": 2, "attention_k_eq_v": True},
    "glm4": {"pad_token_id": 0},
    "gpt2": {**_GPT},
    "gpt_bigcode": {**_GPT},
    "gpt_bigcode:heads": {**_GPT, "multi_query": False},
    "gpt_neox": {**_OLD},
    "gpt_neox:sequential": {**_OLD, "use_parallel_residual": False},
    "gpt_oss": {**_MOE, "sliding_window": 8},
    "gptj": {**_GPT, "rotary_dim": 4},
    "granite": {"attention_bias": True, "mlp_bias": True, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "helium": {"attention_bias": True, "mlp_bias": True},
    "hunyuan_v1_dense": {"attention_bias": True},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "ministral": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 3},
    "ministral3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1,
                                       "original_max_position_embeddings": 8}},
    "mistral": {"sliding_window": 8},
    "mixtral": {**_MOE},
    "mpt": {**_MPT, "attn_config": {"clip_qkv": 0.3}},
    "mpt:plain": {**_MPT},
    "nemotron": {"attention_bias": True, "mlp_bias": True},
    "olmo": {"attention_bias": True},
    "olmo3": {"sliding_window": 8},
    "olmo:clipped": {"clip_qkv": 0.3},
    "olmoe": {**_MOE, "clip_qkv": 0.8},
    "opt": {**_OLD, "intermediate_size": ..., "ffn_dim": 48},
    "persimmon": {**_OLD},
    "phi:norms": {"qk_layernorm": True},
    "qwen2_moe": {**_MOE, "mlp_only_layers": [4], "shared_expert_intermediate_size": 40},
    "qwen3": {"attention_bias": True},
    "qwen3_5_moe_text": {**_MOE, **_LINEAR, "shared_expert_intermediate_size": 40},
    "qwen3_5_moe_text:published": {**_MOE, **_LINEAR, "shared_expert_intermediate_size": 40},
    "qwen3_5_text": {**_LINEAR, "attention_bias": True},
    "qwen3_moe": {**_MOE, "mlp_only_layers": [4], "decoder_sparse_step": 1},
    "qwen3_next": {**_MOE, **_LINEAR, "shared_expert_intermediate_size": 40, "mlp_only_layers": [4]},
    "qwen3_vl_moe_text": {**_MOE, "mlp_only_layers": [4], **_SECTIONS},
    "qwen3_vl_moe_text:published": {**_MOE, **_SECTIONS},
    "qwen3_vl_text": {**_SECTIONS},
    "qwen2_vl_text": {**_SECTIONS},
    "qwen2_5_vl_text": {**_SECTIONS},
    "seed_oss": {"attention_out_bias": True, "mlp_bias": True, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "smollm3": {"attention_bias": True, "mlp_bias": True},
    "stablelm": {"use_qkv_bias": True},
    "stablelm:parallel": {"use_parallel_residual": True, "qk_layernorm": True},
    "xglm": {**_OLD, "intermediate_size": ..., "d_model": 32, "num_layers": 6, "attention_heads": 4, "ffn_dim": 48},
}  # fmt: skip
#: text parts that transformers loads only with the vision tower, which reads images of 2 x 2 patches: the whole's type
COMPOSITES: Mapping[str, tuple[str, Mapping]] = {
    "glm4v_moe_text": ("glm4v_moe", {**_VISION, "out_hidden_size": 32}),
    "qwen2_5_vl_text": ("qwen2_5_vl", {**_VISION, "out_hidden_size": 32, "fullatt_block_indexes": [1]}),
    "qwen2_vl_text": ("qwen2_vl", {**_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}),
    "qwen3_vl_moe_text": ("qwen3_vl_moe", {**_VISION, "out_hidden_size": 32, "deepstack_visual_indexes": []}),
    "qwen3_vl_text": ("qwen3_vl", {**_VISION, "out_hidden_size": 32, "deepstack_visual_indexes": []}),
}
