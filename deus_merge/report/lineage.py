"""Lineage: which layers of a plan's sources earlier up-scalings put in."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ..core.errors import CheckpointError, DeusMergeError
from ..core.text import plural
from ..models.source import SourceModel
from ..plan.documents import PlannedResult
from ..plan.types import Plan
from ..recipe.writer import dump_recipe
from .manifest import MANIFEST, manifest_among
from .manifest_parts import Growth
from .plan_manifest import planned_source, sha256
from .shareable import shared_name


def ancestors(plan: Plan) -> tuple[tuple[Growth, ...], tuple[str, ...]]:
    """The growths of a plan's sources, their layers numbered as in the output.

    Returns:
        The growths, the oldest first, without the plan itself; and a warning for each source whose manifest cannot be
        used.
    """
    found: dict[str, Growth] = {}
    warnings: list[str] = []
    for index, model in enumerate(plan.models):
        for growth in _growths_of(model, warnings):
            known = found.get(growth.plan_hash, replace(growth, new_layers=()))
            layers = {*known.new_layers, *_layers_from(plan, index, growth.new_layers)}
            trained = known.trained or growth.trained
            found[growth.plan_hash] = replace(known, new_layers=tuple(sorted(layers)), trained=trained)
    return tuple(found.values()), tuple(warnings)


def _growths_of(model: SourceModel, warnings: list[str]) -> tuple[Growth, ...]:
    """The growths of one source, as its manifest records them; for a document, as its manifest would record them."""
    if isinstance(model.checkpoint, PlannedResult):
        plan = model.checkpoint.plan
        earlier, lost = ancestors(plan)
        warnings += lost
        own = Growth(
            plan_hash=plan.hash,
            sources=tuple(planned_source(m.checkpoint, str(m.ref)) for m in plan.models),
            recipe=sha256(dump_recipe(plan.recipe, shared_name).encode()),
            new_layers=plan.new_layers,
            trained=False,
        )
        return (*earlier, own) if earlier or plan.new_layers else ()
    try:
        manifest = manifest_among(model.checkpoint.side_files)
        if manifest is None:
            return ()
        if manifest.num_layers != model.view.num_layers:
            raise CheckpointError(f"it describes {plural(manifest.num_layers, 'layer')}, not {model.view.num_layers}")
        return manifest.growths
    except DeusMergeError as error:
        warnings.append(f"the lineage of {model.ref} is lost, its {MANIFEST} cannot be used: {error.message}")
        return ()


def _layers_from(plan: Plan, model: int, layers: Collection[int]) -> list[int]:
    """The output's layers that come from these layers of a source, alone or merged with others; without new ones."""
    return [
        layer
        for block in plan.main_blocks
        if not block.new and any(s.model == model and s.layer in layers for s in block.sources)
        for layer in block.layers
    ]
