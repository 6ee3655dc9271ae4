"""Small models of every family, and how tests look at checkpoints: by safetensors and transformers, not by us."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

TEXT = "The module defines a class whose methods open a file, read lines and return the number of bytes.\n" * 3

_SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama_bias": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 16}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}),
}


def make_model(
    folder: Path, family: str = "llama", *, layers: int = 4, tied: bool = False, seed: int = 0,
    dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **config,
) -> Path:  # fmt: skip
    """A random model of a family, as transformers saves it; biases and norms are random too."""
    kind, extra = FAMILIES[family]
    settings = {**_SMALL, **extra, "num_hidden_layers": layers, "tie_word_embeddings": tied, **config}
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(kind(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read by the safetensors library."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def load(folder: Path):
    """The model in float32 by transformers, which must find every tensor and miss none."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load(folder)(ids).logits


def token_ids(folder: Path, text: str = TEXT) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer(text, return_tensors="pt")["input_ids"][:, :128]


def write_recipe(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
