"""Checkpoints that transformers quantises with bitsandbytes, and values as bitsandbytes dequantises them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes import functional
from safetensors.torch import load_file
from variant import Variant


def _make(base: Path, folder: Path, settings: Mapping[str, Any]) -> None:
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=transformers.BitsAndBytesConfig(**settings), device_map="cpu", dtype=torch.bfloat16
    )
    quantized.save_pretrained(folder)


def values_4bit(folder: Path) -> Mapping[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name in [n.removesuffix(".quant_map") for n in tensors if n.endswith(".weight.quant_map")]:
        stats = {n: t for n, t in tensors.items() if n.startswith(f"{name}.")}
        state = functional.QuantState.from_dict(stats, torch.device("cpu"))
        state.dtype = torch.float32  # the dtype of the result: the arithmetic is float32 for every dtype
        with torch.compiler.set_stance("force_eager"):  # rows of odd length would be compiled first
            found[name] = functional.dequantize_4bit(tensors[name], state)
    return found


def values_8bit(folder: Path) -> Mapping[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    scales = {n.removesuffix(".SCB"): t for n, t in tensors.items() if n.endswith(".SCB")}
    return {f"{n}.weight": functional.int8_vectorwise_dequant(tensors[f"{n}.weight"], t) for n, t in scales.items()}


_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16}  # fmt: skip
_FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
VARIANTS = {
    "bnb_nf4": Variant("llama", partial(_make, settings=_NF4), values_4bit),
    "bnb_fp4": Variant("llama", partial(_make, settings=_FP4), values_4bit),
    "bnb_int8": Variant("llama", partial(_make, settings={"load_in_8bit": True}), values_8bit),
}
