"""Checkpoints as GPTQModel writes them, by the definition of its layout in code of their own (no library that writes
them installs everywhere), and their values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from variant import Variant

_META = {"damp_percent": 0.05, "quantizer": ["gptqmodel:2.2.0"], "true_sequential": True, "uri":
         "https://github.com/modelcloud/gptqmodel"}  # fmt: skip
ACT_ORDER = {"bits": 4, "checkpoint_format": "gptq", "desc_act": True, "group_size": 32, "lm_head": False,
             "meta": _META, "pack_dtype": "int32", "quant_method": "gptq", "sym": False}  # fmt: skip
V2 = {**ACT_ORDER, "bits": 8, "checkpoint_format": "gptq_v2", "desc_act": False, "group_size": 64, "sym": True}


def pack(numbers: np.ndarray, bits: int) -> torch.Tensor:
    """(r, n) numbers -> (r, n * bits / 32) int32, the first in the lowest bits."""
    digits = numbers.astype(np.int64)[..., None] >> np.arange(bits) & 1  # (r, n, bits)
    packed = np.packbits(digits.reshape(len(numbers), -1).astype(np.uint8), axis=-1, bitorder="little")
    return torch.from_numpy(packed.view("<i4").copy())


def numbers(words: np.ndarray, bits: int) -> np.ndarray:
    """(r, w) words -> (r, w * 32 / bits) numbers."""
    digits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    return digits.reshape(len(words), -1, bits) @ (1 << np.arange(bits))


def one_in_each(bits: int) -> int:
    return int(sum(1 << place for place in range(0, 32, bits)))


def parts(weight: torch.Tensor, section: Mapping, seed: int = 0) -> dict[str, torch.Tensor]:
    """The stored tensors of a weight (out, in), rounded to nearest in groups of inputs, which act-order mixes."""
    bits, inputs, values = section["bits"], weight.shape[1], weight.float().numpy()
    size = inputs if section["group_size"] == -1 else section["group_size"]
    order = np.random.default_rng(seed).permutation(inputs) if section["desc_act"] else np.arange(inputs)
    groups = np.empty(inputs, dtype=np.int32)
    groups[order] = np.arange(inputs) // size
    most, count = 2**bits - 1, -(-inputs // size)
    low = np.stack([values[:, groups == g].min(-1) for g in range(count)]).clip(max=0)  # (groups, out)
    high = np.stack([values[:, groups == g].max(-1) for g in range(count)]).clip(min=0)
    if section["sym"]:
        high = np.maximum(high, -low)
        low = -high
    scales = np.maximum((high - low) / most, 1e-4).astype(np.float16).astype(np.float32)
    zeros = np.full_like(low, 2 ** (bits - 1)) if section["sym"] else np.round(-low / scales).clip(0, most)
    if not section["sym"]:
        zeros[:, ::32] = 0  # as for weights that are never negative: format gptq borrows for them
    codes = np.round(values.T / scales[groups] + zeros[groups]).clip(0, most)  # (in, out)
    stored = pack(zeros, bits).numpy().view(np.uint32)
    if section["checkpoint_format"] == "gptq":
        stored = stored - np.uint32(one_in_each(bits))
    return {"qweight": pack(codes.T, bits).T.contiguous(), "qzeros": torch.from_numpy(stored.view(np.int32)),
            "scales": torch.from_numpy(scales).half(), "g_idx": torch.from_numpy(groups)}  # fmt: skip


def make(base: Path, folder: Path, section: Mapping) -> None:
    config = json.loads((base / "config.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**config, "dtype": "float16", "quantization_config": dict(section)}, indent=2)
    (folder / "config.json").write_text(text)
    tensors = {}
    for seed, (name, tensor) in enumerate(sorted(load_file(base / "model.safetensors").items())):
        if name.endswith("_proj.weight"):
            for part, value in parts(tensor, section, seed).items():
                tensors[f"{name.removesuffix('weight')}{part}"] = value
        else:
            tensors[name] = tensor.half()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def values(folder: Path) -> Mapping[str, torch.Tensor]:
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = load_file(folder / "model.safetensors")
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    return {f"{module}.weight": value(tensors, module, section) for module in modules}


def value(tensors: Mapping[str, torch.Tensor], module: str, section: Mapping) -> torch.Tensor:
    """A weight (out, in), input by input."""
    stored = {part: tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "g_idx")}
    scales = tensors[f"{module}.scales"].double().numpy()
    bits = len(stored["qweight"]) * 32 // len(stored["g_idx"])
    words = stored["qzeros"].numpy().view(np.uint32)
    if section["checkpoint_format"] == "gptq":
        words = words + np.uint32(one_in_each(bits))
    zeros = numbers(words, bits)  # (groups, out)
    codes = numbers(stored["qweight"].numpy().T, bits)  # (out, in)
    columns = [(codes[:, i] - zeros[g]) * scales[g] for i, g in enumerate(stored["g_idx"].tolist())]
    return torch.from_numpy(np.stack(columns, axis=1)).float()


VARIANTS = {
    "gptq": Variant("llama", partial(make, section=ACT_ORDER), values, loads=False),
    "gptq_v2": Variant("llama", partial(make, section=V2), values, loads=False),
}
