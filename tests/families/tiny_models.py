"""A tiny random model of every described family, as transformers saves it; every parameter is lively."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import torch
import transformers

from deus_merge.models.family import families

_SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
#: what a model type needs beyond `_SMALL`: so that all its kinds of layers are there, and its options are on
SETTINGS: Mapping[str, Mapping] = {
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8},
    "cohere": {"use_qk_norm": True},
    "cohere2": {"sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_inner": 48, "n_positions": 128, "num_key_value_heads": 4},
    "gpt_oss": {**_MOE, "sliding_window": 8},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "olmo3": {"sliding_window": 8},
    "qwen3": {"attention_bias": True},
    "qwen3_moe": {**_MOE, "mlp_only_layers": [4], "decoder_sparse_step": 1},
}
MODEL_TYPES = sorted(
    {kind for family in families().values() for kind in family.model_types} & {*transformers.CONFIG_MAPPING}
)


def make(folder: Path, model_type: str, seed: int = 0, **more) -> Path:
    """Save a tiny model; ``more`` are values of its config."""
    config = transformers.AutoConfig.for_model(model_type, **{**_SMALL, **SETTINGS.get(model_type, {}), **more})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@functools.cache
def shared(model_type: str, seed: int = 0) -> Path:
    """A tiny model that no test changes."""
    return make(Path(tempfile.mkdtemp(prefix=f"deus-{model_type}-")), model_type, seed)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """As transformers loads it; attention as plain matrix products, which round the same way for any mask."""
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, **plain
    )
    found = {key: names for key, names in report.items() if names}
    assert not found, found
    return model.eval()


def logits(model: transformers.PreTrainedModel, tokens: int = 24) -> torch.Tensor:
    """(1, tokens, vocabulary): longer than the sliding windows."""
    ids = torch.randint(3, 96, (1, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), _all_in(model.dtype):
        return model(ids, use_cache=False).logits


@contextlib.contextmanager
def _all_in(dtype: torch.dtype):
    """Modules that compute parts in float32 do not, in float64."""
    with (
        mock.patch.object(torch, "float32", dtype),
        mock.patch.object(torch, "float", dtype),
        mock.patch.object(torch.Tensor, "float", lambda x: x.to(dtype)),
    ):
        yield


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())
