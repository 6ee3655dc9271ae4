"""A tiny random model of every described family, as transformers saves it; every parameter is lively."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

import torch
import transformers
from more_settings import SECOND
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deus_merge.models.family import families


def type_of(kind: str) -> str:
    """The model type of a kind."""
    return kind.partition(":")[0]


_SMALL = {
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
#: what a model type needs beyond `_SMALL` so that all its kinds of layers are there, and its options are on; ``...``
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


def _stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts that are saved one by one, in tensors of a layer."""
    pattern = re.compile(r"(.*mlp\.experts\.)\d+\.(gate|up|down)_proj\.weight")
    found: dict[tuple[str, str], list[torch.Tensor]] = {}
    for name in sorted(tensors):
        if match := pattern.fullmatch(name):
            found.setdefault((match[1], match[2]), []).append(tensors[name])
    rest = {name: x for name, x in tensors.items() if not pattern.fullmatch(name)}
    for prefix in {prefix for prefix, _ in found}:
        gate, up, down = (torch.stack(found[prefix, role]) for role in ("gate", "up", "down"))
        rest |= {f"{prefix}gate_up_proj": torch.cat((gate, up), 1), f"{prefix}down_proj": down}
    return rest


def _turned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stacked experts as (E, inputs, outputs)."""
    return {n: x.transpose(1, 2).contiguous() if ".experts." in n else x for n, x in tensors.items()}


#: kinds as they are published, where transformers saves them in another form
PUBLISHED = {"qwen3_5_moe_text:published": _stacked, "qwen3_vl_moe_text:published": _turned}
#: text parts of other models only, but there is a class for them
transformers.AutoModelForCausalLM.register(transformers.Mistral4Config, transformers.Mistral4ForCausalLM, exist_ok=True)
_LOADED = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *COMPOSITES, "mistral4"}
_TYPES = {kind for family in families().values() for kind in family.model_types} & _LOADED
#: model types, and further settings of some: ``falcon:new``
MODEL_TYPES = sorted(_TYPES | {kind for kind in SETTINGS if type_of(kind) in _TYPES})


def make(folder: Path, kind: str, seed: int = 0, deepstack: Sequence[int] = (), **more) -> Path:
    """Save a tiny model; ``more`` are values of its config, ``deepstack`` are the layers of a vision tower whose
    features enter after the first text layers."""
    model_type = type_of(kind)
    values = {k: v for k, v in {**_SMALL, **SETTINGS.get(kind, {}), **more}.items() if v is not ...}
    if model_type in COMPOSITES:
        model_type, vision = COMPOSITES[model_type]
        vision = {k: [*deepstack] if k == "deepstack_visual_indexes" else v for k, v in vision.items()}
        ids = {f"{name}_token_id": 90 + i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))}
        values = {"text_config": values, "vision_config": vision, **ids, "tie_word_embeddings": False}
    config = transformers.AutoConfig.for_model(model_type, **values)
    torch.manual_seed(seed)
    model = _auto(model_type).from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if kind in PUBLISHED:
        tensors = PUBLISHED[kind](load_file(folder / "model.safetensors"))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@functools.cache
def shared(kind: str, seed: int = 0) -> Path:
    """A tiny model that no test changes."""
    return make(Path(tempfile.mkdtemp(prefix=f"deus-{type_of(kind)}-")), kind, seed)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """As transformers loads it; attention as plain matrix products, which round the same way for any mask."""
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    auto = _auto(config_of(folder)["model_type"])
    model, report = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True, **plain)
    found = {key: names for key, names in report.items() if names}
    assert not found, found
    for parameter in model.parameters():  # matrix products round by where in memory a matrix begins
        parameter.data = parameter.data.to(dtype, copy=True)  # also of those that are kept in float32
    return model.eval()


def _auto(model_type: str) -> type:
    """The class that loads models of a type."""
    composite = any(model_type == whole for whole, _ in COMPOSITES.values())
    return transformers.AutoModelForImageTextToText if composite else transformers.AutoModelForCausalLM


def logits(model: transformers.PreTrainedModel, tokens: int = 24) -> torch.Tensor:
    """(1, tokens, vocabulary): longer than the sliding windows."""
    ids = torch.randint(3, 96, (1, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), _all_in(model.dtype):
        return model(ids, use_cache=False).logits


@contextlib.contextmanager
def _all_in(dtype: torch.dtype) -> Iterator[None]:
    """Modules that compute parts in float32 do not, in float64."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with (
        mock.patch.object(torch, "float32", dtype),
        mock.patch.object(torch, "float", dtype),
        mock.patch.object(torch.Tensor, "float", lambda x: x.to(dtype)),
    ):
        try:
            yield
        finally:
            torch.set_default_dtype(usual)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())
