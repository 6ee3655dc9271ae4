"""``deus_merge.json``: what was made from what, and how well it went."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path

from .. import __version__
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
        "tensors": {t.task.name: _origin(plan, block, t) for block, t in plan.outputs},
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())},
        "warnings": list(plan.warnings),
    }


def read_manifest(folder: Path) -> dict:
    """The manifest of a finished output.

    Raises:
        CheckpointError: there is none, or it is not one of this format.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"no manifest: {error.strerror}", where=path, hint="only folders that deus-merge wrote have one"
        ) from None
    except ValueError as error:
        raise CheckpointError("the manifest is not JSON", where=path, got=error) from None
    if (
        not isinstance(data, dict)
        or data.get("format") != FORMAT
        or not all(isinstance(data.get(k), dict) for k in ("tensors", "files"))
    ):
        raise CheckpointError("not a manifest this version reads", where=path, expected=f"format {FORMAT}")
    return data


def _origin(plan: Plan, block, tensor) -> dict:
    data = {"action": tensor.action}
    if tensor.action == "copy":
        info = tensor.inputs[tensor.source]
        data |= {"model": block.sources[tensor.source].model, "tensor": info.name}
    return data


def _versions() -> dict[str, str]:
    names = ("torch", "safetensors", "transformers", "POT", "scipy", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
