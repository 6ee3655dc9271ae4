"""Tiny float models that the tests of formats quantise: bfloat16, three layers, sizes that no block size divides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers

SIZES = {"num_hidden_layers": 3, "vocab_size": 96, "max_position_embeddings": 64}


def _llama() -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(
        **SIZES, hidden_size=192, intermediate_size=320, num_attention_heads=6, num_key_value_heads=2, head_dim=32
    )


def _qwen3() -> transformers.PretrainedConfig:
    return transformers.Qwen3Config(
        **SIZES, hidden_size=192, intermediate_size=320, num_attention_heads=6, num_key_value_heads=2, head_dim=32
    )


def _qwen3_moe() -> transformers.PretrainedConfig:
    return transformers.Qwen3MoeConfig(
        **SIZES, hidden_size=192, intermediate_size=320, moe_intermediate_size=64, num_experts=4, head_dim=32,
        num_experts_per_tok=2, num_attention_heads=6, num_key_value_heads=2, norm_topk_prob=True,
    )  # fmt: skip


def _gpt_oss() -> transformers.PretrainedConfig:
    return transformers.GptOssConfig(
        **SIZES, hidden_size=192, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2, head_dim=32,
        num_attention_heads=6, num_key_value_heads=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip


MODELS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": _llama, "qwen3": _qwen3, "qwen3_moe": _qwen3_moe, "gpt_oss": _gpt_oss,
}  # fmt: skip


def write_float_model(name: str, folder: Path, seed: int = 0) -> None:
    """Write one of `MODELS` with weights large enough that every layer matters."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
