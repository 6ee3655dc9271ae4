"""The manifest of a plan that was carried out."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from .. import __version__
from ..checkpoint.contents import contents_digest
from ..checkpoint.dequantized import DequantizedSource
from ..checkpoint.formats.registry import is_zeros
from ..checkpoint.reader import TensorSource
from ..core.tensors import CONSTANT, UNCHANGED, Action, WrittenTensor
from ..core.typed_json import parse
from ..methods.base import OutputTensor
from ..models.config_json import dtype_named
from ..models.config_rules import config_patch
from ..models.layer_facts import expand, listed_keys, plain
from ..plan.blocks import BlockPlan, by_layer
from ..plan.types import Plan
from .manifest import FORMAT, USER_FILES, Manifest
from .manifest_parts import (
    BlockSeconds,
    DocumentRecord,
    Growth,
    ManifestBlock,
    ManifestLayer,
    ManifestModule,
    ManifestSource,
    ManifestTensor,
    RunSettings,
    VocabularyRecord,
    WeightFile,
)


def manifest_of(
    plan: Plan,
    files: Mapping[str, bytes],
    diagnostics: Mapping[int, Sequence[Mapping]],
    times: Mapping[int, BlockSeconds],
    options: Mapping[str, object],
    ancestors: Sequence[Growth] = (),
) -> Manifest:
    """The manifest of a plan's output, without checksums of the tensors.

    Args:
        plan: What was run.
        files: The files other than the weights: name -> bytes. They get a checksum, but for the model card, which is
            the user's to edit.
        diagnostics: By the index of a block: what its method reported about each tensor, as JSON data.
        times: By the index of a block: what its making took its time for.
        options: Of the run: device, threads, seconds.
        ancestors: Earlier growths of the sources (`lineage.ancestors`).

    Raises:
        Misfit: the diagnostics or the options lack a required key.
    """
    donor = plan.donor
    sources = plan_sources(plan)
    depths = {_stored(m.checkpoint): m.view.num_layers for m in plan.models}
    order = list(sources)
    modules = {
        name: ManifestModule(
            num_layers=part["num_layers"], layers=_layers(part["layers"], plan.modules[name], diagnostics)
        )
        for name, part in plan.module_maps().items()
    }
    documents = plan.describe()["documents"] if plan.documents else []
    facts = expand(plan.config, donor.view.layers_path, donor.view.model_type)
    manifest = Manifest(
        format=FORMAT,
        deus_merge=__version__,
        plan_hash=plan.hash,
        versions=_versions(),
        options=parse(RunSettings, {**options, "date": _today()}),
        donor=0,
        donor_config=config_patch(plan.config, donor.checkpoint.config),
        layer_prefix=donor.view.layer_prefix,
        sources=tuple(planned_source(s, name, depths.get(s)) for s, name in sources.items()),
        num_layers=plan.num_layers,
        dtype=dtype_named(plan.config),
        layer_lists=listed_keys(plan.config, donor.view.layers_path, facts),
        layer_facts=plain(facts),
        function_preserving=plan.function_preserving,
        new_layers=plan.new_layers,
        new_parameters=plan.new_parameters,
        layers=_layers(plan.layer_map(), plan.main_blocks, diagnostics),
        modules=modules or None,
        documents=tuple(parse(DocumentRecord, document) for document in documents),
        tensors={
            written.name: _tensor(plan, block, output, written, order)
            for block, output in plan.outputs
            for written in output.written
        },
        files={name: sha256(content) for name, content in sorted(files.items()) if name not in USER_FILES},
        weights={s.filename: WeightFile(bytes=s.size, header_sha256=sha256(s.header)) for s in plan.shards},
        warnings=plan.warnings,
        blocks=tuple(ManifestBlock(block=b.title, seconds=times[b.index]) for b in plan.blocks if b.index in times),
        vocabulary=parse(VocabularyRecord, dict(plan.vocabulary)) if plan.vocabulary else None,
    )
    return replace(manifest, lineage=(*ancestors, manifest.growth)) if ancestors else manifest


def plan_sources(plan: Plan) -> dict[TensorSource, str]:
    """The plan's models, in their order, and the checkpoints behind them that copies come from: source -> name.
    Quantised models as they are stored."""
    sources = {_stored(m.checkpoint): str(m.ref) for m in plan.models}
    for block, output in plan.outputs:
        if output.action is Action.COPY:
            checkpoint, _ = _root(plan, block, output)
            sources.setdefault(checkpoint, str(checkpoint.where))
    return sources


def _stored(source: TensorSource) -> TensorSource:
    return source.stored if isinstance(source, DequantizedSource) else source


def planned_source(source: TensorSource, name: str, layers: int | None = None) -> ManifestSource:
    """A source of a plan as a manifest records it.

    Args:
        source: The source.
        name: How the recipe refers to it.
        layers: The number of its layers, where it is a model of the plan.
    """
    record = {"model": name, "fingerprint": source.fingerprint, **source.provenance}
    planned = parse(ManifestSource, record | ({} if layers is None else {"layers": layers}))
    elsewhere = any(stamp.tag is not None for stamp in source.stamp())  # its ETags or its commit say more
    if planned.document is not None or elsewhere:
        return planned
    return replace(planned, contents=contents_digest(source))


def sha256(content: bytes) -> str:
    """The digest of a file's bytes in hex."""
    return hashlib.sha256(content).hexdigest()


def _layers(
    layer_map: Sequence[Mapping], blocks: Sequence[BlockPlan], diagnostics: Mapping[int, Sequence[Mapping]]
) -> tuple[ManifestLayer, ...]:
    """A layer map with the diagnostics of the blocks of each layer."""
    blocks_of = by_layer(blocks)

    def found(layer: int) -> list[Mapping]:
        return [entry for block in blocks_of[layer] for entry in diagnostics.get(block.index, ())]

    return tuple(parse(ManifestLayer, {**entry, "diagnostics": found(entry["layer"])}) for entry in layer_map)


def _tensor(
    plan: Plan, block: BlockPlan, output: OutputTensor, written: WrittenTensor, sources: Sequence[TensorSource]
) -> ManifestTensor:
    """How a tensor of the output's files came about."""
    facts = {"dtype": written.dtype, "shape": written.shape, "weight": output.name if written.part else None}
    if written.stored is not None:
        checkpoint, name = _root(plan, block, output)
        part = written.stored.name if written.part else name
        return ManifestTensor(action=output.action, **facts, model=sources.index(checkpoint), tensor=part)
    if output.quantization and output.action is Action.ZEROS and not is_zeros(output.quantization, written.part):
        return ManifestTensor(action=Action.COMPUTE, **facts)
    if output.action in CONSTANT:
        return ManifestTensor(action=output.action, **facts)
    only = output.source if output.action in UNCHANGED else None
    pairs = zip(output.inputs, block.sources, strict=True)
    derived = (s.model for i, (stored, s) in enumerate(pairs) if stored.derived and only in (None, i))
    return ManifestTensor(action=output.action, **facts, derived=tuple(derived))


def _root(plan: Plan, block: BlockPlan, output: OutputTensor) -> tuple[TensorSource, str]:
    """The checkpoint that a copy is stored in, and the name of the tensor there."""
    assert output.source is not None
    return plan.models[block.sources[output.source].model].checkpoint.root(output.stored.name)


def _today() -> str:
    """The day in UTC; that of ``SOURCE_DATE_EPOCH``, as reproducible builds set it, where it is set."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    return time.strftime("%Y-%m-%d", time.gmtime(int(epoch) if epoch.isdecimal() else None))


def _versions() -> dict[str, str]:
    names = ["torch", "safetensors", "transformers", "POT", "scipy", "numpy"]
    names += ["peft"] if importlib.util.find_spec("peft") else []
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
