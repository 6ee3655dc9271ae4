"""``deus_merge.json``: what was made from what, and how well it went."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from .. import __version__
from ..checkpoint.header import parse_json, read_small
from ..errors import CheckpointError
from ..plan import Plan

MANIFEST = "deus_merge.json"
RECIPE = "deus_merge.yml"
FORMAT = 1


def manifest(
    plan: Plan, files: Mapping[str, bytes], diagnostics: Mapping[int, list[dict]], options: Mapping[str, object]
) -> dict:
    """The manifest as JSON data.

    Args:
        plan: What was run.
        files: What stands beside the weights: name -> bytes; their sha256 go in.
        diagnostics: Per block index, what its method said of each tensor.
        options: Of the run: device, threads.

    Returns:
        ``format``, ``plan_hash``, ``versions``, ``sources``, ``new_layers``, ``new_parameters`` (exact names to train),
        ``layers`` with origin and diagnostics, and ``tensors``: how each came about.
    """
    layers = plan.layer_map()
    for block in plan.blocks:
        for layer in block.layers:
            layers[layer]["diagnostics"] = diagnostics.get(block.index, [])
    return {
        "format": FORMAT,
        "deus_merge": __version__,
        "plan_hash": plan.hash,
        "versions": _versions(),
        "options": dict(options),
        "donor": plan.donor,
        "sources": [
            {"model": str(m.ref), "folder": str(m.checkpoint.folder), "fingerprint": m.checkpoint.fingerprint}
            for m in plan.models
        ],
        "num_layers": plan.num_layers,
        "function_preserving": plan.function_preserving,
        "new_layers": list(plan.new_layers),
        "new_parameters": list(plan.new_parameters),
        "layers": layers,
        "tensors": {t.task.name: _origin(plan, block, t) for block in plan.blocks for t in block.tensors},
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())},
        "warnings": list(plan.warnings),
    }


def read_manifest(folder: Path) -> dict:
    """The manifest of a finished output.

    Raises:
        CheckpointError: there is none, or it is not one of this format.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        hint = "only folders that deus-merge wrote have one"
        raise CheckpointError("no manifest: No such file or directory", where=path, hint=hint)
    data = parse_json(read_small(path), path, "manifest")
    if data.get("format") != FORMAT or not all(isinstance(data.get(key), kind) for key, kind in _KINDS.items()):
        raise CheckpointError("not a manifest this version reads", where=path, expected=f"format {FORMAT}")
    if problem := _problem(data["tensors"], data["files"], data["sources"], data["donor"]):
        raise CheckpointError(f"the manifest is malformed: {problem}", where=path)
    return data


_KINDS = {
    "tensors": dict, "files": dict, "sources": list, "donor": int, "num_layers": int, "new_layers": list,
    "function_preserving": bool,
}  # fmt: skip


def _problem(tensors: dict, files: dict, sources: list, donor: int) -> str | None:
    """What is wrong with a manifest that somebody else may have written; None when nothing is."""
    keys = ("model", "fingerprint")
    told = all(isinstance(s, dict) and all(isinstance(s.get(key), str) for key in keys) for s in sources)
    if not told or not 0 <= donor < len(sources):
        return "sources"
    for name, origin in tensors.items():
        if not isinstance(origin, dict) or not isinstance(origin.get("action"), str):
            return f"tensor {name!r}"
        model = origin.get("model")
        if origin["action"] == "copy" and not (
            isinstance(origin.get("tensor"), str)
            and isinstance(model, int)
            and 0 <= model < len(sources)
            and isinstance(sources[model].get("folder"), str)
        ):
            return f"tensor {name!r} is a copy of nothing"
    strange = [name for name, digest in files.items() if Path(name).name != name or not isinstance(digest, str)]
    return f"file {strange[0]!r}" if strange else None


def _origin(plan: Plan, block, tensor) -> dict:
    data = {"action": tensor.action}
    if tensor.action == "copy":
        info = tensor.inputs[tensor.source]
        data |= {"model": block.sources[tensor.source].model, "tensor": info.name}
    return data


def _versions() -> dict[str, str]:
    names = ("torch", "safetensors", "transformers", "POT", "scipy", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
