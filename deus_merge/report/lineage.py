"""Growth upon growth: what the manifests of a plan's sources tell of the layers that come from them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from ..core.errors import CheckpointError, DeusMergeError
from ..models.source import SourceModel
from ..models.view import prefix_of
from ..plan.documents import PlannedResult
from ..plan.types import Plan
from ..recipe.writer import dump_recipe
from .manifest import MANIFEST, growth, read_manifest


def generations(record: Mapping) -> list[dict]:
    """A manifest's growths, the oldest first, its own last: at least one.

    Raises:
        CheckpointError: the manifest is not complete.
    """
    try:
        return [
            {
                "plan_hash": str(entry["plan_hash"]),
                "sources": entry["sources"],
                "recipe": entry["recipe"],
                "new_layers": [int(layer) for layer in entry["new_layers"]],
                "trained": bool(entry["trained"]),
            }
            for entry in [*record.get("lineage", [])[:-1], growth(record)]
        ]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError("the manifest is not complete", where=MANIFEST) from None


def grown_names(record: Mapping) -> frozenset[str]:
    """Names of the tensors that any growth of a manifest put in."""
    earlier = [layer for growth in generations(record)[:-1] for layer in growth["new_layers"]]
    prefixes = tuple(prefix_of(layer, record["layer_prefix"]) for layer in earlier)
    return frozenset(record["new_parameters"]) | {name for name in record["tensors"] if name.startswith(prefixes)}


def ancestors(plan: Plan) -> tuple[list[dict], tuple[str, ...]]:
    """The growths of a plan's sources, their layers numbered as in the output.

    Returns:
        ``plan_hash``, ``sources``, ``recipe`` (digest of deus_merge.yml), ``new_layers`` and ``trained`` of each, the
        oldest first, without the plan itself; and a warning for each source whose manifest cannot be used.
    """
    found: dict[str, dict] = {}
    warnings: list[str] = []
    for index, model in enumerate(plan.models):
        for entry in _growths(model, warnings):
            known = found.setdefault(entry["plan_hash"], entry | {"new_layers": []})
            known["new_layers"] = sorted({*known["new_layers"], *_moved(plan, index, entry["new_layers"])})
            known["trained"] |= entry["trained"]
    return list(found.values()), tuple(warnings)


def _growths(model: SourceModel, warnings: list[str]) -> list[dict]:
    """Of one source, as its manifest has them; of a document, as it would have."""
    if isinstance(model.checkpoint, PlannedResult):
        plan = model.checkpoint.plan
        before, lost = ancestors(plan)
        warnings += lost
        recipe = hashlib.sha256(dump_recipe(plan.recipe).encode()).hexdigest()
        sources = [
            {"model": str(m.ref), **m.checkpoint.provenance, "fingerprint": m.checkpoint.fingerprint}
            for m in plan.models
        ]
        own = {"plan_hash": plan.hash, "sources": sources, "recipe": recipe}
        own |= {"new_layers": list(plan.new_layers), "trained": False}
        return [*before, own] if before or plan.new_layers else []
    file = model.checkpoint.side_files.get(MANIFEST)
    if not isinstance(file, Path):
        return []
    try:
        record = read_manifest(file)
        if record.get("num_layers") != model.view.num_layers:
            raise CheckpointError(f"it tells of {record.get('num_layers')} layers, not of {model.view.num_layers}")
        return generations(record)
    except DeusMergeError as error:
        warnings.append(f"the lineage of {model.ref} is lost, its {MANIFEST} cannot be used: {error.message}")
        return []


def _moved(plan: Plan, model: int, layers: list[int]) -> list[int]:
    """Where layers of a source stand in the output, as themselves or merged with others: not what is new there."""
    return [
        layer
        for block in plan.main_blocks
        if not block.new and any(s.model == model and s.layer in layers for s in block.sources)
        for layer in block.layers
    ]
