"""Settings of tiny models with experts, latent attention, Mamba and the like, sorted by model type."""

from __future__ import annotations

from collections.abc import Mapping

_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
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
#: what a model type needs beyond the common settings, as in ``tiny_models.SETTINGS``
SECOND: Mapping[str, Mapping] = {
    "afmoe": {
        **_MOE, "num_shared_experts": 1, "num_dense_layers": 1, "sliding_window": 8, "global_attn_every_n_layers": 3,
    },
    "axk1": {**_LATENT, **_ROUTED, "first_k_dense_replace": 1},
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
    "glm4v_moe_text": {
        **_ROUTED, "first_k_dense_replace": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                            "mrope_section": [1, 1, 0]},
    },
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
    "granitemoehybrid:dense": {
        **_MAMBA, "shared_intermediate_size": 40, "num_local_experts": 0, "num_experts_per_tok": 0,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "attention_bias": True},
    "hy_v3": {**_MOE, "num_shared_experts": 1},
    "hy_v4": {**_LATENT, **_ROUTED, **_INDEXER, "hc_mult": 2},
    "jamba": {
        **_MOE, "expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 1, "attn_layer_offset": 0,
        "mamba_d_state": 4, "mamba_dt_rank": 4,
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
    "minicpm3": {**_LATENT},
    "minimax": {**_MOE, "block_size": 8},
    "minimax_m2": {**_MOE, "head_dim": 8},
    "mistral4": {**_LATENT, **_ROUTED, "first_k_dense_replace": 1, "qk_nope_head_dim": 4},
    "nemotron_h": {
        **_ROUTED, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 2,
        "num_hidden_layers": 8, "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2,
        "chunk_size": 8, "moe_shared_expert_intermediate_size": 40, "mlp_bias": True,
        "attention_bias": True,
    },
    "nemotron_h:latent": {
        **_ROUTED, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 2,
        "num_hidden_layers": 8, "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2,
        "chunk_size": 8, "moe_shared_expert_intermediate_size": 40, "mlp_bias": True, "moe_latent_size": 16,
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
    "youtu": {**_LATENT},
}  # fmt: skip
