"""Checkpoints as AutoAWQ 0.2 writes them, by the definition of its GEMM layout in code of their own (no library that
writes them installs everywhere), and their values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from variant import Variant

#: the k-th nibble of a word, from the lowest, belongs to output ORDER[k] of eight
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
SECTION = {"bits": 4, "group_size": 64, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm",
           "zero_point": True}  # fmt: skip


def pack(numbers: np.ndarray) -> torch.Tensor:
    """(r, 8 w) numbers below 16 -> (r, w) int32."""
    ordered = numbers.astype(np.uint8).reshape(len(numbers), -1, 8)[..., ORDER]  # (r, w, 8)
    return torch.from_numpy((ordered[..., 0::2] | ordered[..., 1::2] << 4).copy().view("<i4")[..., 0])


def numbers(words: torch.Tensor) -> np.ndarray:
    """(r, w) int32 -> (r, 8 w) numbers below 16."""
    bits = np.unpackbits(words.numpy().astype("<i4")[..., None].view(np.uint8), axis=-1, bitorder="little")
    nibbles = bits.reshape(*words.shape, 8, 4) @ np.array([1, 2, 4, 8])  # (r, w, 8)
    found = np.empty_like(nibbles)
    found[..., ORDER] = nibbles
    return found.reshape(len(words), -1)


def parts(weight: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    """The stored tensors of a weight (out, in), rounded to nearest in groups of ``size`` inputs."""
    groups = weight.float().numpy().reshape(len(weight), -1, size)  # (out, groups, size)
    low, high = groups.min(-1).clip(max=0), groups.max(-1).clip(min=0)  # (out, groups)
    scales = np.maximum((high - low) / 15, 1e-4).astype(np.float16).astype(np.float32)
    zeros = np.round(-low / scales).clip(0, 15)
    codes = np.round(groups / scales[..., None] + zeros[..., None]).clip(0, 15)
    return {"qweight": pack(codes.reshape(weight.shape).T), "qzeros": pack(zeros.T),
            "scales": torch.from_numpy(scales.T.copy()).half()}  # fmt: skip


def make(base: Path, folder: Path, section: Mapping = SECTION) -> None:
    config = json.loads((base / "config.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**config, "dtype": "float16", "quantization_config": dict(section)}, indent=2)
    (folder / "config.json").write_text(text)
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            for part, value in parts(tensor, section["group_size"]).items():
                tensors[f"{name.removesuffix('weight')}{part}"] = value
        else:
            tensors[name] = tensor.half()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def values(folder: Path) -> Mapping[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for module in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        scales = tensors[f"{module}.scales"].double().numpy()
        codes, zeros = numbers(tensors[f"{module}.qweight"]), numbers(tensors[f"{module}.qzeros"])
        size = len(codes) // len(scales)
        value = [(row - zeros[i // size]) * scales[i // size] for i, row in enumerate(codes)]  # (in, out)
        found[f"{module}.weight"] = torch.from_numpy(np.stack(value, axis=1)).float()
    return found


VARIANTS = {"awq": Variant("llama", make, values, loads=False)}
