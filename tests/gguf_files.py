"""GGUF files as llama.cpp's converter lays them out, written with its own package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

PERMUTED = ("llama",)
NORM_PLUS_ONE = ("gemma2",)
TRANSPOSED = ("c_attn", "c_proj", "c_fc")  # GPT-2's linear layers


def write_gguf(
    path: Path,
    model,
    tokenizer=None,
    kind: Callable[[str], str] = lambda name: "F32",
    chat_template: str = "",
    more: Callable | None = None,
) -> Path:
    """A model's file: llama.cpp's names, Llama's query and key rows in its rotary order, Gemma's norms plus 1.

    Args:
        path: The file.
        model: A causal language model of transformers.
        tokenizer: A byte-level BPE tokenizer whose first two tokens are special.
        kind: Name of a tensor with two axes -> the name of its type; a K-quant, which the package cannot make, gets
            random blocks.
        chat_template: The tokenizer's.
        more: Called with the writer, before the tensors.
    """
    import gguf

    config, architecture = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(head)
        writer.add_key_length(head)
    if tokenizer is None:
        writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    else:
        _add_tokenizer(writer, tokenizer, config.vocab_size, chat_template)
    if more is not None:
        more(writer)

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    rng = np.random.default_rng(0)
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        stem, suffix = name.rsplit(".", 1)
        array = _as_stored(architecture, stem, tensor.detach().float().numpy(), config)
        type_ = gguf.GGMLQuantizationType[kind(name) if array.ndim == 2 else "F32"]
        data = _random_blocks(array.shape, type_, rng) if "_K" in type_.name else gguf.quantize(array, type_)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer, tokenizer, rows: int, chat_template: str) -> None:
    import gguf

    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    padding = [f"[PAD{i}]" for i in range(len(tokenizer), rows)]
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))) + padding)
    types = [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokenizer) - 2)
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * len(padding))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if chat_template:
        writer.add_chat_template(chat_template)


def _as_stored(architecture: str, stem: str, array: np.ndarray, config) -> np.ndarray:
    """A tensor's values in their order in the file."""
    last = stem.rsplit(".", 1)[-1]
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", None)}.get(last)
    if architecture in PERMUTED and heads:
        halves = array.reshape(heads, 2, -1, array.shape[1])  # (h, 2, d/2, i)
        array = halves.swapaxes(1, 2).reshape(array.shape)
    if architecture in NORM_PLUS_ONE and "norm" in last:
        array = array + 1
    if architecture == "gpt2" and last in TRANSPOSED and array.ndim == 2:
        array = array.T
    return np.ascontiguousarray(array)


def _random_blocks(shape: tuple[int, ...], type_, rng) -> np.ndarray:
    """Random codes with small scales, (rows, bytes of a row)."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[type_]
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    half = {"Q6_K": slice(-2, None), "Q4_K": slice(0, 4)}[type_.name]  # where a block has its float16 scales
    count = raw[..., half].shape[-1] // 2
    scales = rng.uniform(1e-4, 1e-3, (*raw.shape[:-1], count)).astype(np.float16)
    raw[..., half] = scales.view(np.uint8).reshape(raw[..., half].shape)
    return raw.reshape(*shape[:-1], -1)
