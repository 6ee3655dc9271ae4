"""Checkpoints as llm-compressor writes them: every weight through the compressors of compressed-tensors itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import compressed_tensors as library
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.utils.match import match_name
from safetensors.torch import load_file, save_file
from variant import Variant

FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False, "strategy": "group", "group_size": 64}
NVFP4 = {
    "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn",
}  # fmt: skip
TOKENS = {"num_bits": 8, "symmetric": True, "dynamic": True, "strategy": "token"}


def group(weights: dict, inputs: dict | None = None, targets: tuple = ("Linear",), format_: str | None = None) -> dict:
    """An entry of ``config_groups``."""
    return {
        "targets": list(targets), "weights": {"dynamic": False} | weights, "input_activations": inputs,
        "output_activations": None, "format": format_,
    }  # fmt: skip


GROUPS: dict[str, tuple[str, list[dict]]] = {
    "ct_fp8_tensor": (
        "float-quantized",
        [group(FP8 | {"strategy": "tensor"}, {"num_bits": 8, "type": "float", "strategy": "tensor"})],
    ),
    "ct_fp8_channel": ("float-quantized", [group(FP8 | {"strategy": "channel"}, TOKENS | {"type": "float"})]),
    "ct_fp8_block": (
        "float-quantized",
        [group(
            FP8 | {"strategy": "block", "block_structure": [128, 128]},
            {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "group", "group_size": 64},
        )],
    ),
    "ct_int8": (
        "int-quantized",
        [group({"num_bits": 8, "type": "int", "strategy": "channel"}, TOKENS | {"type": "int"})],
    ),
    "ct_int4_group": ("pack-quantized", [group(INT4)]),
    "ct_int4_asymmetric": ("pack-quantized", [group(INT4 | {"symmetric": False})]),
    "ct_int4_ordered": ("pack-quantized", [group(INT4 | {"symmetric": False, "actorder": "group"})]),
    "ct_int8_packed": ("pack-quantized", [group({"num_bits": 8, "type": "int", "strategy": "channel"})]),
    "ct_nvfp4": ("nvfp4-pack-quantized", [group(NVFP4, NVFP4 | {"dynamic": "local"})]),
    "ct_mixed": (
        "mixed-precision",
        [
            group(
                FP8 | {"strategy": "channel"}, TOKENS | {"type": "float"},
                (r"re:.*self_attn\.(q|k|v|o)_proj$",), "float-quantized",
            ),
            group(NVFP4, None, (r"re:.*mlp\..*_proj$",), "nvfp4-pack-quantized"),
        ],
    ),
    "ct_fp8_kv": (
        "float-quantized",
        [group(FP8 | {"strategy": "tensor"}, {"num_bits": 8, "type": "float", "strategy": "tensor"})],
    ),
    "ct_fp8_experts": ("float-quantized", [group(FP8 | {"strategy": "channel"}, TOKENS | {"type": "float"})]),
    "ct_int4_experts": ("pack-quantized", [group(INT4)]),
}  # fmt: skip


def make(name: str, source: Path, target: Path) -> None:
    """Quantise every linear layer of a folder but its head and routers."""
    format_, entries = GROUPS[name]
    ignore = ["lm_head", r"re:.*mlp\.gate$"] if "experts" in name else ["lm_head"]
    schemes = [_scheme(entry, format_) for entry in entries]
    written: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        module = key.removesuffix(".weight")
        scheme = None if any(match_name(module, name) for name in ignore) else _scheme_of(module, schemes)
        if tensor.ndim < 2 or scheme is None or "embed" in module:
            written[key] = tensor
        else:
            ordered = "ordered" in name
            written |= {f"{module}.{part}": found for part, found in compress(tensor, scheme, ordered=ordered).items()}
        if name == "ct_fp8_kv" and module.endswith(("k_proj", "v_proj")):
            written[f"{module[:-5]}_scale"] = torch.tensor([6.0 / 448], dtype=torch.bfloat16)
    kv_cache = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    section = QuantizationConfig.model_validate({
        "config_groups": {f"group_{index}": scheme for index, scheme in enumerate(schemes)},
        "format": format_, "quantization_status": "compressed", "ignore": ignore, "global_compression_ratio": None,
        "kv_cache_scheme": kv_cache if name == "ct_fp8_kv" else None,
    }).model_dump(mode="json")  # fmt: skip
    for index, entry in enumerate(entries):
        if order := entry["weights"].get("actorder"):
            section["config_groups"][f"group_{index}"]["weights"]["actorder"] = order
    write(source, target, written, section | {"version": library.__version__, "sparsity_config": {}})


def write(source: Path, target: Path, tensors: Mapping[str, torch.Tensor], section: Mapping[str, Any]) -> None:
    """A folder with these tensors, the section, and else the config of another folder."""
    target.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        target / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": section}, indent=2))
    if (source / "generation_config.json").exists():
        shutil.copy(source / "generation_config.json", target)


def compress(weight: torch.Tensor, scheme: QuantizationScheme, ordered: bool = False) -> dict[str, torch.Tensor]:
    """The stored tensors of a module, by their last names, from its weight (out, in)."""
    args, inputs = scheme.weights, scheme.input_activations
    assert args is not None and scheme.format is not None
    order = None
    if ordered:  # columns that matter alike share a group; the library no longer writes this, but people have it
        shuffled = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(weight.shape[1]))
        order = shuffled % (weight.shape[1] // (args.group_size or 1))  # (in,)
        weight = weight[:, torch.argsort(order, stable=True)]
    whole = {"weight_global_scale": generate_gparam(*torch.aminmax(weight))} if args.strategy == "tensor_group" else {}
    low, high = _extremes(weight, args)
    scales, zeros = calculate_qparams(low, high, args, global_scale=whole.get("weight_global_scale"))
    state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros, **whole}
    compressor: Any = BaseCompressor.get_value_from_registry(scheme.format)
    state = dict(compressor.compress(state, scheme))
    if order is not None:
        codes = state["weight_packed"].view(torch.uint8)
        codes = torch.stack((codes & 15, codes >> 4), 2).flatten(1)[:, torch.argsort(torch.argsort(order, stable=True))]
        state["weight_packed"] = (codes[:, 0::2] | codes[:, 1::2] << 4).contiguous().view(torch.int32)
        state["weight_g_idx"] = order.to(torch.int32)
    if inputs is not None and inputs.strategy == "tensor" and not inputs.dynamic:
        state["input_scale"] = torch.tensor([6.0 / 448], dtype=weight.dtype)
    if inputs is not None and inputs.strategy == "tensor_group":
        state["input_global_scale"] = torch.tensor([448.0 * 6.0 / 6.0])
    return state


def values(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a folder, each decompressed by the library, with its scales in float32."""
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored = load_file(folder / "model.safetensors")
    schemes = [_scheme(entry, section["format"]) for entry in section["config_groups"].values()]
    found: dict[str, torch.Tensor] = {}
    for key in stored:
        module, _, last = key.rpartition(".")
        if last == "weight_scale":
            scheme = _scheme_of(module, schemes)
            assert scheme is not None
            parts = {name.removeprefix(f"{module}."): part for name, part in stored.items() if name.startswith(module)}
            found[f"{module}.weight"] = decompress(parts, scheme)
    return found


def decompress(parts: Mapping[str, torch.Tensor], scheme: QuantizationScheme) -> torch.Tensor:
    """The weight (out, in) of a module in float32, from its stored tensors by their last names."""
    args = scheme.weights
    assert args is not None and scheme.format is not None
    state = dict(parts)
    order = state.pop("weight_g_idx", None)
    if order is not None:
        forth = torch.argsort(order, stable=True)
        codes = state["weight_packed"].view(torch.uint8)
        codes = torch.stack((codes & 15, codes >> 4), 2).flatten(1)[:, forth]
        state["weight_packed"] = (codes[:, 0::2] | codes[:, 1::2] << 4).contiguous().view(torch.int32)
        args = args.model_copy(update={"actorder": None})
    scales = state["weight_scale"].to(torch.float32)
    if "weight_global_scale" in state:
        packed = state["weight_packed"]
        codes = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], torch.float32)
        return dequantize(codes, scales, args=args, dtype=torch.float32, global_scale=state["weight_global_scale"])
    compressor: Any = BaseCompressor.get_value_from_registry(scheme.format)
    weight = compressor.decompress(state | {"weight_scale": scales}, scheme)["weight"]
    return weight if order is None else weight[:, torch.argsort(torch.argsort(order, stable=True))]


def _extremes(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and largest value of all that share a scale, in the shape of the scales."""
    if args.strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    height, width = args.block_structure or (1, args.group_size)
    rows = [torch.stack([part.amin() for part in row.split(width, 1)]) for row in weight.split(height)]
    tops = [torch.stack([part.amax() for part in row.split(width, 1)]) for row in weight.split(height)]
    return torch.stack(rows), torch.stack(tops)


def _scheme(entry: Mapping[str, Any], format_: str) -> QuantizationScheme:
    """A group of a config as the library has it. The order of columns, which it no longer takes, is left out."""
    weights = {key: value for key, value in entry["weights"].items() if (key, value) != ("actorder", "group")}
    return QuantizationScheme.model_validate({**entry, "weights": weights, "format": entry["format"] or format_})


def _scheme_of(module: str, schemes: list[QuantizationScheme]) -> QuantizationScheme | None:
    return next((s for s in schemes if any(t == "Linear" or match_name(module, t) for t in s.targets)), None)


VARIANTS = {
    name: Variant(
        model="qwen3_moe" if "experts" in name else "llama",
        make=partial(make, name),
        values=values,
        loads=name not in ("ct_int4_asymmetric", "ct_int4_ordered"),  # transformers 5.23 expects unpacked zero points
        mixes=name != "ct_int4_experts",
    )
    for name in GROUPS
}
