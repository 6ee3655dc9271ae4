"""``deus_merge.json``: what was made from what, and how well it went."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Mapping
from pathlib import Path

from .. import __version__
from ..checkpoint.reader import TensorSource
from ..errors import CheckpointError
from ..plan import BlockPlan, Plan, PlannedTensor

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
    blocks = (block for block in plan.blocks for _ in block.layers)
    for entry, block in zip(layers, blocks, strict=True):
        entry["diagnostics"] = diagnostics.get(block.index, [])
    sources = {m.checkpoint: str(m.ref) for m in plan.models}
    tensors = {t.task.name: _origin(plan, block, t, sources) for block in plan.blocks for t in block.tensors}
    return {
        "format": FORMAT,
        "deus_merge": __version__,
        "plan_hash": plan.hash,
        "versions": _versions(),
        "options": dict(options),
        "donor": plan.donor,
        "sources": [{"model": name, **s.told, "fingerprint": s.fingerprint} for s, name in sources.items()],
        "num_layers": plan.num_layers,
        "function_preserving": plan.function_preserving,
        "new_layers": list(plan.new_layers),
        **({"modules": depths} if (depths := plan.depths()) else {}),
        "new_parameters": list(plan.new_parameters),
        "layers": layers,
        **({"documents": plan.describe()["documents"]} if plan.documents else {}),
        "tensors": tensors,
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


def _origin(plan: Plan, block: BlockPlan, tensor: PlannedTensor, sources: dict[TensorSource, str]) -> dict:
    """How a tensor came about; a copy's checkpoint, which may stand behind one of the plan's, joins the sources."""
    if tensor.action != "copy":
        return {"action": tensor.action}
    model = plan.models[block.sources[tensor.source].model]
    checkpoint, name = model.checkpoint.origin(tensor.inputs[tensor.source].name)
    sources.setdefault(checkpoint, str(checkpoint.folder))
    return {"action": "copy", "model": list(sources).index(checkpoint), "tensor": name}


def _versions() -> dict[str, str]:
    names = ["torch", "safetensors", "transformers", "POT", "scipy", "numpy"]
    names += ["peft"] if importlib.util.find_spec("peft") else []
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
