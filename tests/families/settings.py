"""What a tiny model of each described model type needs in its config, so that all its kinds of layers are there and its
options are on. ``type:name`` is another model of a type. ``...`` removes a key that all others have."""

from __future__ import annotations

from collections.abc import Mapping

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
_ROUTED = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 2,
    "topk_group": 1, "norm_topk_prob": True,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "head_dim": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 10,
}  # fmt: skip
_MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_n_groups": 1, "mamba_chunk_size": 8,
}  # fmt: skip
_INDEXER = {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 2}
#: what a model type needs beyond `SMALL` so that all its kinds of layers are there, and its options are on; ``...``
#: for a key that it cannot have
SETTINGS: dict[str, Mapping] = {
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
    "afmoe": {
        **_MOE, "num_shared_experts": 1, "num_dense_layers": 1, "sliding_window": 8, "global_attn_every_n_layers": 3,
    },
    "bailing_hybrid": {
        **_LATENT, **_MOE, "num_experts_per_token": 2, "num_shared_experts": 1, "first_k_dense_replace": 1,
        "num_expert_group": 2, "topk_group": 1, "layer_group_size": 3, "linear_head_dim": 8, "linear_num_heads": 4,
    },
    "bamba": {**_MAMBA, "attn_layer_indices": [2, 4]},
    "deepseek_v2": {**_LATENT, **_ROUTED, "first_k_dense_replace": 1, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_LATENT, **_ROUTED, "first_k_dense_replace": 2, "attention_bias": True},
    "deepseek_v32": {**_LATENT, **_ROUTED, **_INDEXER, "first_k_dense_replace": 2},
    "deepseek_v4": {
        **_ROUTED, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8, "sliding_window": 8, **_INDEXER,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}, "head_dim": 16,
        "num_hash_layers": 1, "hc_mult": 2, "num_key_value_heads": 1,
    },
    "dots1": {**_ROUTED, "first_k_dense_replace": 1, "sliding_window": 8, "max_window_layers": 3},
    "ernie4_5": {"use_bias": True},
    "ernie4_5_moe": {
        "moe_intermediate_size": 24, "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1, "use_bias": True,
        "moe_layer_start_index": 1, "moe_layer_end_index": 4, "moe_layer_interval": 1,
    },
    "exaone_moe": {
        **_MOE, "num_shared_experts": 1, "first_k_dense_replace": 1, "sliding_window": 8, "n_group": 2, "topk_group": 1,
        "sliding_window_pattern": 3,
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64, "mamba_rms_norm": True, "attention_bias": True, "mlp_bias": True},
    "falcon_mamba": {"state_size": 4, "time_step_rank": 4},
    "flex_olmo": {**_MOE},
    "gemma3n_text": {
        "sliding_window": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "laurel_rank": 8,
        "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.9] * 3 + [0.0] * 3, "intermediate_size": [48] * 6,
    },
    "glm4_moe": {**_ROUTED, "first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True},
    "glm4_moe_lite": {**_LATENT, **_ROUTED},
    "glm_moe_dsa": {
        **_LATENT, **_ROUTED, **_INDEXER, "first_k_dense_replace": 2,
        "indexer_types": ["full", "full", "shared", "full", "shared", "shared"],
    },
    "granitemoe": {**_MOE, "attention_bias": True},
    "granitemoehybrid": {
        **_MAMBA, **_MOE, "shared_intermediate_size": 40, "attention_bias": True,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
    },
    "granitemoeshared": {**_MOE, "shared_intermediate_size": 40},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "attention_bias": True},
    "hy_v3": {**_MOE, "num_shared_experts": 1},
    "hy_v4": {**_LATENT, **_ROUTED, **_INDEXER, "hc_mult": 2},
    "jamba": {
        **_MOE, "expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 1, "attn_layer_offset": 0,
        "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "kimi_linear": {
        **_LATENT, **_MOE, "q_lora_rank": None, "num_experts_per_token": 2, "num_shared_experts": 1,
        "first_k_dense_replace": 1, "num_expert_group": 2, "topk_group": 1, "linear_head_dim": 8, "linear_num_heads": 4,
    },
    "lfm2": {"block_multiple_of": 8, "full_attn_idxs": [2, 4], "conv_bias": True},
    "lfm2_moe": {
        **_MOE, "num_dense_layers": 2, "conv_bias": True,
        "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention", "conv"],
    },
    "llama4_text": {
        **_MOE, "num_experts_per_tok": 1, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8, "attention_bias": True,
    },
    "longcat_flash": {
        **_LATENT, "num_layers": 3, "ffn_hidden_size": 48, "moe_topk": 2, "n_routed_experts": 4, "zero_expert_num": 2,
        "expert_ffn_hidden_size": 24,
    },
    "mamba": {"state_size": 4, "time_step_rank": 4, "use_bias": True},
    "mamba2": {"state_size": 8, "num_heads": 8, "n_groups": 2, "chunk_size": 8, "use_bias": True},
    "minimax": {**_MOE, "block_size": 8},
    "minimax_m2": {**_MOE, "head_dim": 8},
    "mistral4": {
        **_LATENT, **_ROUTED, "first_k_dense_replace": 1,
        "qk_nope_head_dim": 4,
    },
    "nemotron_h": {
        **_ROUTED, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 2,
        "num_hidden_layers": 8, "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2,
        "chunk_size": 8, "moe_shared_expert_intermediate_size": 40, "use_mamba_kernels": False, "mlp_bias": True,
        "attention_bias": True,
    },
    "phimoe": {**_MOE, "attention_bias": True, "lm_head_bias": True},
    "qwen4_exp_text": {
        **_MOE, "hc_count": 2, "hc_lowrank": 8, "shared_expert_intermediate_size": 24, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2,
        "layer_types": ["linear_attention", "linear_attention", "indexed_attention"] * 2,
    },
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64, "rescale_every": 0},
    "solar_open": {**_ROUTED},
    "zamba": {
        "attention_hidden_size": 64, "attention_head_dim": 16, "mamba_d_state": 4, "mamba_dt_rank": 4,
        "use_mamba_kernels": False, "num_key_value_heads": 4,
    },
    "zamba2": {"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "chunk_size": 8, "use_mamba_kernels": False},
}  # fmt: skip
SETTINGS |= {
    "granitemoehybrid:dense": {**SETTINGS["granitemoehybrid"], "num_local_experts": 0, "num_experts_per_tok": 0},
    "nemotron_h:latent": {**SETTINGS["nemotron_h"], "moe_latent_size": 16},
}
#: text parts that transformers loads only with the vision tower, which reads images of 2 x 2 patches: the whole's type
COMPOSITES: Mapping[str, tuple[str, Mapping]] = {
    "qwen2_5_vl_text": ("qwen2_5_vl", {**_VISION, "out_hidden_size": 32, "fullatt_block_indexes": [1]}),
    "qwen2_vl_text": ("qwen2_vl", {**_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}),
    "qwen3_vl_moe_text": ("qwen3_vl_moe", {**_VISION, "out_hidden_size": 32, "deepstack_visual_indexes": []}),
    "qwen3_vl_text": ("qwen3_vl", {**_VISION, "out_hidden_size": 32, "deepstack_visual_indexes": []}),
}
