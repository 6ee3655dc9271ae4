"""Finished outputs to damage, and a manifest made to fit the damage."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
import xxhash
from support import make_model

from deus_merge.report.manifest import seal


def sources(folder: Path, tokenizer: Path) -> None:
    """``base`` in bfloat16 and ``other`` in float32, both with the tokenizer of a model and just enough rows for it."""
    make_model(folder / "base", vocab_size=2048, dtype=torch.bfloat16)
    make_model(folder / "other", vocab_size=2048, seed=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / "base" / name)


#: casts layers 0 and 1, keeps two, makes one: every way a tensor can come about
EVERY_ACTION = """
base_model: {folder}/base
out_dtype: bfloat16
slices:
  - merge_method: passthrough
    sources: [{{model: {folder}/other, layer_range: [0, 2]}}]
  - merge_method: ot_fuse
    sources: [{{model: {folder}/base, layer_range: [2, 4]}}]
"""


def places(out: Path) -> dict[str, tuple[Path, int, int]]:
    """Each tensor's file, first byte and end, by the format's definition."""
    found = {}
    for file in sorted(out.glob("*.safetensors")):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = file, start + begin, start + end
    return found


def reseal(out: Path) -> None:
    """A manifest whose checksums fit the folder as it is now."""
    record = json.loads((out / "deus_merge.json").read_text())
    record["files"] = {n: hashlib.sha256((out / n).read_bytes()).hexdigest() for n in record["files"]}
    for name, facts in record["weights"].items():
        data = (out / name).read_bytes()
        header = data[: 8 + int.from_bytes(data[:8], "little")]
        facts |= {"bytes": len(data), "header_sha256": hashlib.sha256(header).hexdigest()}
    for name, (file, begin, end) in places(out).items():
        record["tensors"][name]["xxh3_128"] = xxhash.xxh3_128_hexdigest(file.read_bytes()[begin:end])
    (out / "deus_merge.json").write_bytes(seal(record))


def edit_json(path: Path, **changes) -> None:
    """Set keys of a JSON file; None takes one away."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
