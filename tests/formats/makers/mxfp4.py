"""gpt-oss in MXFP4. transformers dequantises it on a CPU, but quantises on a GPU only: blocks are computed here from
the Microscaling specification (OCP, section 6.3), a table of distances instead of bits."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors
from variant import Variant


def quantise(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (E, in, out) as blocks (E, out, in / 32, 16) and scales (E, out, in / 32)."""
    groups = values.float().transpose(1, 2).unflatten(-1, (-1, 32))  # (E, out, in / 32, 32)
    exponents = groups.abs().amax(-1).log2().floor() - 2  # the largest code is 1.5 * 2 ** 2
    scaled = groups / exponents.exp2()[..., None]  # (E, out, in / 32, 32)
    codes = (scaled[..., None] - torch.tensor(FP4_VALUES)).abs().argmin(-1)  # (E, out, in / 32, 32)
    blocks = codes[..., ::2] + (codes[..., 1::2] << 4)  # (E, out, in / 32, 16)
    return blocks.to(torch.uint8), (exponents + 127).to(torch.uint8)


def make(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, values in load_file(source / "model.safetensors").items():
        if name.endswith((".gate_up_proj", ".down_proj")):
            blocks, scales = quantise(values)
            tensors |= {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": scales.contiguous()}
        else:
            tensors[name] = values
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    section = {
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
        ],
        "quant_method": "mxfp4",
    }  # fmt: skip
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}, indent=2))


def values(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name, part in tensors.items():
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            found[stem] = convert_moe_packed_tensors(part, tensors[f"{stem}_scales"], dtype=torch.float32)
        elif not name.endswith("_scales"):
            found[name] = part.float()
    return found


VARIANTS = {"mxfp4": Variant("gpt_oss", make, values)}
