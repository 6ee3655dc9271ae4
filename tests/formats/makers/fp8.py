"""Checkpoints in FP8, as DeepSeek, Qwen, Mistral, AutoFP8, ModelOpt and fbgemm publish them.

transformers quantises and dequantises blocks that divide a weight; blocks at the edges, which it does not know, and
scales under other names are computed here from their definition.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from variant import Variant

FP8 = torch.float8_e4m3fn
Quantise = Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]]


def write(source: Path, folder: Path, section: dict, quantise: Quantise) -> None:
    """Quantise the linear layers of a float model, but for its head and its routers."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, values in load_file(source / "model.safetensors").items():
        linear = name.endswith("_proj.weight")
        tensors |= (
            {key: part.contiguous() for key, part in quantise(name, values).items()} if linear else {name: values}
        )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}, indent=2))
    for extra in source.glob("generation_config.json"):
        shutil.copy(extra, folder)


def blocks(values: torch.Tensor, key: str, size: list[int] | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Codes and scales as transformers quantises: names end in ``weight`` and ``weight_scale_inv``."""
    fmt = "ue8m0" if dtype == torch.float8_e8m0fnu else "float"
    config = FineGrainedFP8Config(weight_block_size=size, scale_fmt=fmt)  # pyright: ignore[reportArgumentType]
    library = Fp8Quantize(SimpleNamespace(quantization_config=config))
    found = library._quantize_one(key, values)
    scale = next(name for name in found if name.endswith("_scale_inv"))
    return found | {scale: found[scale].to(dtype)}


def rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and a scale for each row (out, 1)."""
    scale = values.float().abs().amax(1, keepdim=True) / 448  # (out, 1)
    return (values.float() / scale).to(FP8), scale


def tiles(values: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of square blocks, those at the edges smaller, one at a time as DeepSeek-V3 defines them."""
    out, inputs = values.shape
    codes = torch.empty(values.shape, dtype=FP8)
    scales = torch.empty(-(-out // size), -(-inputs // size))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
            scales[i, j] = values[place].float().abs().max() / 448
            codes[place] = (values[place].float() / scales[i, j]).to(FP8)
    return codes, scales


def by_transformers(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    library = Fp8Dequantize(None)
    return {
        name: library._dequantize_one(codes, tensors[f"{name}_scale_inv"], torch.float32)
        if codes.dtype in (FP8, torch.float8_e5m2)
        else codes.float()
        for name, codes in tensors.items()
        if not name.endswith("_scale_inv") and not name.endswith(".activation_scale")
    }


def by_definition(folder: Path, size: int = 0) -> dict[str, torch.Tensor]:
    """Values by the definition: scales spread over their blocks, or over the rows or the tensor (size 0)."""
    tensors = load_file(folder / "model.safetensors")
    values = {}
    for name, codes in tensors.items():
        if codes.dtype == FP8:
            scale = tensors[f"{name}_scale_inv" if size else f"{name}_scale"].float()
            if size:
                scale = torch.kron(scale, torch.ones(size, size))[: codes.shape[0], : codes.shape[1]]
            values[name] = codes.float() * scale
        elif "_scale" not in name:
            values[name] = codes.float()
    return values


def _make_blocks(source: Path, folder: Path, *, dtype: torch.dtype, routers: bool = False, **more: object) -> None:
    section = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [64, 64]}
    if routers:
        layers = [f"model.layers.{i}" for i in range(3)]
        parts = ("input_layernorm", "mlp.gate", "post_attention_layernorm")
        section["modules_to_not_convert"] = ["lm_head", *(f"{layer}.{part}" for layer in layers for part in parts)]
    write(source, folder, section | more, lambda key, values: blocks(values, key, [64, 64], dtype))


def _make_partial(source: Path, folder: Path) -> None:
    section = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    write(source, folder, section, lambda key, v: dict(zip((key, f"{key}_scale_inv"), tiles(v, 128), strict=True)))


def _make_tensor(source: Path, folder: Path) -> None:
    def quantise(key: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
        found = blocks(values, key, None, torch.bfloat16)
        scale = found[f"{key}_scale_inv"].reshape(())
        activation = torch.tensor(0.0123, dtype=torch.bfloat16)
        return found | {f"{key}_scale_inv": scale, key.replace("weight", "activation_scale"): activation}

    section = {"activation_scheme": "static", "dequantize": False, "modules_to_not_convert": ["lm_head"],
               "quant_method": "fp8", "weight_block_size": None}  # fmt: skip
    write(source, folder, section, quantise)


def _make_named(source: Path, folder: Path, *, section: dict, shape: tuple[int, ...], cache: str) -> None:
    def quantise(key: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = values.float().abs().max() / 448
        codes = (values.float() / scale).to(FP8)
        module = key.removesuffix("weight")
        found = {key: codes, f"{key}_scale": scale.reshape(shape), f"{module}input_scale": torch.full(shape, 0.0123)}
        if (letter := module[-7]) in "kv" and module.endswith("_proj."):
            parent = module.rpartition("self_attn.")[0] + "self_attn."
            found[cache.format(parent=parent, module=module, letter=letter)] = torch.full(shape, 0.0456)
        return found

    write(source, folder, section, quantise)


def _make_rows(source: Path, folder: Path) -> None:
    section = {"activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"], "quant_method": "fbgemm_fp8"}
    write(source, folder, section, lambda key, v: dict(zip((key, f"{key}_scale"), rows(v), strict=True)))


_AUTOFP8 = {
    "activation_scheme": "static",
    "ignored_layers": ["lm_head"],
    "kv_cache_scheme": "static",
    "quant_method": "fp8",
}
_FLOAT = {"dynamic": False, "num_bits": 8, "type": "float"}
_MODELOPT = {
    "config_groups": {"group_0": {"input_activations": _FLOAT, "targets": ["Linear"], "weights": _FLOAT}},
    "ignore": ["lm_head"], "kv_cache_scheme": _FLOAT, "producer": {"name": "modelopt", "version": "0.33.1"},
    "quant_algo": "FP8", "quant_method": "modelopt",
}  # fmt: skip

VARIANTS = {
    # transformers has no blocks at the edges: sizes that divide the tiny models' weights
    "fp8_block": Variant("qwen3", partial(_make_blocks, dtype=torch.bfloat16), by_transformers),
    "fp8_block_moe": Variant("qwen3_moe", partial(_make_blocks, dtype=torch.bfloat16, routers=True), by_transformers),
    "fp8_block_ue8m0": Variant(
        "qwen3", partial(_make_blocks, dtype=torch.float8_e8m0fnu, scale_fmt="ue8m0"), by_transformers
    ),
    "fp8_block_partial": Variant("qwen3", _make_partial, partial(by_definition, size=128), loads=False),
    "fp8_tensor": Variant("llama", _make_tensor, by_transformers),
    "fp8_tensor_vllm": Variant(  # of AutoFP8; transformers reads no scales of this name
        "llama",
        partial(_make_named, section=_AUTOFP8, shape=(1,), cache="{parent}{letter}_scale"),
        by_definition,
        loads=False,
    ),
    "fp8_modelopt": Variant(
        "llama",
        partial(_make_named, section=_MODELOPT, shape=(), cache="{module}{letter}_scale"),
        by_definition,
        loads=False,
    ),
    "fbgemm_fp8": Variant("llama", _make_rows, by_definition, loads=False),  # transformers: on a GPU only
}
