"""``deus_merge.json``: what was made from what, and how well it went."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import __version__
from ..checkpoint.reader import TensorSource
from ..config import config_patch
from ..errors import CheckpointError
from ..plan import BlockPlan, Plan, PlannedTensor

MANIFEST = "deus_merge.json"
RECIPE = "deus_merge.yml"
FORMAT = 1


def manifest(
    plan: Plan,
    files: Mapping[str, bytes],
    diagnostics: Mapping[int, list[dict]],
    options: Mapping[str, object],
    ancestors: Sequence[Mapping] = (),
) -> dict:
    """The manifest as JSON data.

    Args:
        plan: What was run.
        files: What stands beside the weights: name -> bytes; their sha256 go in.
        diagnostics: Per block index, what its method said of each tensor.
        options: Of the run: device, threads.
        ancestors: Earlier growths of the sources (`lineage.ancestors`).

    Returns:
        ``format``, ``plan_hash``, ``versions``, ``sources``, ``new_layers``, ``new_parameters`` (exact names to train),
        ``layers`` with origin and diagnostics, ``tensors``: how each came about, ``donor_config``: a JSON merge patch
        that makes the donor's config.json of the output's, and ``lineage``, when there were growths before this one.
    """
    donor = plan.models[plan.donor]
    layers, modules = plan.layer_map(), plan.module_maps()
    told = [layers, *(part["layers"] for part in modules.values())]
    made = [plan.main_blocks, *(plan.modules[name] for name in modules)]
    for entries, blocks in zip(told, made, strict=True):
        for entry, block in zip(entries, (b for b in blocks for _ in b.layers), strict=True):
            entry["diagnostics"] = diagnostics.get(block.index, [])
    sources = {m.checkpoint: str(m.ref) for m in plan.models}
    tensors = {t.task.name: _origin(plan, block, t, sources) for block in plan.blocks for t in block.tensors}
    record = {
        "format": FORMAT,
        "deus_merge": __version__,
        "plan_hash": plan.hash,
        "versions": _versions(),
        "options": dict(options),
        "donor": plan.donor,
        "donor_config": config_patch(plan.config, donor.checkpoint.config),
        "layer_prefix": donor.view.layer_prefix,
        "sources": [{"model": name, **s.told, "fingerprint": s.fingerprint} for s, name in sources.items()],
        "num_layers": plan.num_layers,
        "function_preserving": plan.function_preserving,
        "new_layers": list(plan.new_layers),
        "new_parameters": list(plan.new_parameters),
        "layers": layers,
        **({"modules": modules} if modules else {}),
        **({"documents": plan.describe()["documents"]} if plan.documents else {}),
        "tensors": tensors,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())},
        "warnings": list(plan.warnings),
    }
    return record | ({"lineage": [*ancestors, growth(record)]} if ancestors else {})


def growth(record: Mapping) -> dict:
    """A manifest's entry in the lineage of what is made from its output."""
    entry = {"plan_hash": record["plan_hash"], "sources": record["sources"], "recipe": record["files"].get(RECIPE)}
    return entry | {"new_layers": record["new_layers"], "trained": bool(record.get("trained"))}


def read_manifest(folder: Path, needed: Sequence[str] = ()) -> dict:
    """The manifest of a finished output (or the one in this file).

    Args:
        folder: The output, or the manifest itself.
        needed: Keys that it must have: manifests of earlier versions lack some.

    Raises:
        CheckpointError: there is none, or it is not one of this format.
    """
    path = folder if folder.is_file() else folder / MANIFEST
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
    if lacking := [key for key in needed if key not in data]:
        raise CheckpointError(
            f"the manifest lacks {lacking[0]!r}", where=path, hint="an earlier version wrote it: make the output again"
        )
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
