"""Small checkpoints, well-formed and not, built byte by byte."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def raw_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file as its bytes; ``header`` may be any JSON value, text or bytes."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def random_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(32, 8, generator=generator).bfloat16(),
        "model.layers.0.q.weight": torch.randn(8, 8, generator=generator).bfloat16(),
        "model.layers.0.norm.weight": torch.randn(8, generator=generator),
        "model.layers.1.q.weight": torch.randn(8, 8, generator=generator).bfloat16(),
        "model.layers.1.mask": torch.randint(0, 2, (5, 3), generator=generator).bool(),
        "model.scale": torch.tensor(2.5, dtype=torch.float16),
        "model.none": torch.empty(0, 4),
    }


def write_model(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
