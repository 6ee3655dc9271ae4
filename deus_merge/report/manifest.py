"""``deus_merge.json``: what was made from what, how well it went, and checksums of every byte that was written.

Its last line is the sha256 of all bytes before that line, so a manifest that was damaged is no manifest.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import __version__
from ..checkpoint.header import parse_json, read_small
from ..checkpoint.reader import TensorSource
from ..core.errors import CheckpointError, VerifyError, json_text
from ..core.tensors import UNCHANGED, Action
from ..methods.base import OutputTensor
from ..models.config_rules import config_patch, layer_lists
from ..models.view import ModelView, view_model
from ..plan.blocks import BlockPlan
from ..plan.types import Plan
from .shape import problem

MANIFEST = "deus_merge.json"
RECIPE = "deus_merge.yml"
#: 2 added ``weights``, ``dtype``, ``layer_lists``, checksums, dtype and shape of tensors, and the seal; 1 is still read
FORMAT = 3
_DAMAGED = "it was damaged or edited: take it from a backup, or make the output again"
_SEAL = ' "sha256": "%s"\n}\n'


def manifest(
    plan: Plan,
    files: Mapping[str, bytes],
    diagnostics: Mapping[int, list[dict]],
    options: Mapping[str, object],
    ancestors: Sequence[Mapping] = (),
) -> dict:
    """The manifest as JSON data, without checksums of the tensors: `sealed` adds them.

    Args:
        plan: What was run.
        files: What stands beside the weights: name -> bytes; their sha256 go in.
        diagnostics: Per block index, what its method said of each tensor.
        options: Of the run: device, threads, seconds.
        ancestors: Earlier growths of the sources (`lineage.ancestors`).

    Returns:
        ``format``, ``plan_hash``, ``versions``, ``sources`` (the plan's models, then the checkpoints behind them that
        copies come from), ``new_layers``, ``new_parameters`` (exact names to train), ``layers`` with origin and
        diagnostics, ``tensors``: how each came about (``derived``: the models, by index, whose stored tensor is changed
        before the method sees it), ``files``: sha256 of each, ``weights``: size and sha256 of the
        header of each safetensors file, ``donor_config``: a JSON merge patch that makes the donor's config.json of the
        output's, and ``lineage``, when there were growths before this one.
    """
    donor = plan.donor
    layers, modules = plan.layer_map(), plan.module_maps()
    told = [layers, *(part["layers"] for part in modules.values())]
    made = [plan.main_blocks, *(plan.modules[name] for name in modules)]
    for entries, blocks in zip(told, made, strict=True):
        for entry, block in zip(entries, (b for b in blocks for _ in b.layers), strict=True):
            entry["diagnostics"] = diagnostics.get(block.index, [])
    sources = plan_sources(plan)
    depths = {m.checkpoint: {"layers": m.view.num_layers} for m in plan.models}
    order = list(sources)
    tensors = {o.name: _origin(plan, block, o, order) for block, o in plan.outputs}
    record = {
        "format": FORMAT,
        "deus_merge": __version__,
        "plan_hash": plan.hash,
        "versions": _versions(),
        "options": dict(options),
        "donor": 0,
        "donor_config": config_patch(plan.config, donor.checkpoint.config),
        "layer_prefix": donor.view.layer_prefix,
        "sources": [
            {"model": name, **s.provenance, "fingerprint": s.fingerprint, **depths.get(s, {})}
            for s, name in sources.items()
        ],
        "num_layers": plan.num_layers,
        "dtype": plan.config.get("dtype") or plan.config.get("torch_dtype"),
        "layer_lists": sorted(layer_lists(plan.config, donor.view.layers_path)),
        "function_preserving": plan.function_preserving,
        "new_layers": list(plan.new_layers),
        "new_parameters": list(plan.new_parameters),
        "layers": layers,
        **({"modules": modules} if modules else {}),
        **({"documents": plan.describe()["documents"]} if plan.documents else {}),
        "tensors": tensors,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())},
        "weights": {
            s.filename: {"bytes": s.size, "header_sha256": hashlib.sha256(s.header).hexdigest()} for s in plan.shards
        },
        "warnings": list(plan.warnings),
        **({"vocabulary": plan.vocabulary} if plan.vocabulary else {}),
    }
    return record | ({"lineage": [*ancestors, growth(record)]} if ancestors else {})


def plan_sources(plan: Plan) -> dict[TensorSource, str]:
    """The plan's models, in their order, and the checkpoints behind them that copies come from: source -> name."""
    sources = {m.checkpoint: str(m.ref) for m in plan.models}
    for block, output in plan.outputs:
        if output.action is Action.COPY:
            model = plan.models[block.sources[output.source].model]
            checkpoint, _ = model.checkpoint.root(output.stored.name)
            sources.setdefault(checkpoint, str(checkpoint.folder))
    return sources


def growth(record: Mapping) -> dict:
    """A manifest's entry in the lineage of what is made from its output."""
    entry = {"plan_hash": record["plan_hash"], "sources": record["sources"], "recipe": record["files"].get(RECIPE)}
    return entry | {"new_layers": record["new_layers"], "trained": bool(record.get("trained"))}


def sealed(record: Mapping, checksums: Mapping[str, str] | None = None) -> bytes:
    """The manifest's file.

    Args:
        record: As `manifest` makes it.
        checksums: XXH3-128 of each tensor; None where nobody took them.
    """
    if checksums is not None:
        tensors = {name: {**origin, "xxh3_128": checksums[name]} for name, origin in record["tensors"].items()}
        record = {**record, "tensors": tensors}
    text = json_text({k: v for k, v in record.items() if k != "sha256"}, indent=1)
    body = text.removesuffix("\n}").encode() + b",\n"
    return body + (_SEAL % hashlib.sha256(body).hexdigest()).encode()


def read_manifest(folder: Path, needed: Sequence[str] = ()) -> dict:
    """The manifest of a finished output (or the one in this file).

    Args:
        folder: The output, or the manifest itself.
        needed: Keys that it must have: manifests of earlier versions lack some.

    Raises:
        CheckpointError: there is none.
        VerifyError: it is damaged, or not one this version reads.
    """
    path = folder if folder.is_file() else folder / MANIFEST
    if not path.exists():
        hint = "merge and upscale write one; training.carry_manifest takes it along to a trained model"
        raise CheckpointError("no manifest", where=path, hint=hint)
    try:
        raw = read_small(path)
        data = parse_json(raw, path, "manifest")
    except CheckpointError as error:
        raise VerifyError(error.message, where=path, got=error.got) from None
    if data.get("format") not in (FORMAT,):
        got = data.get("format")
        raise VerifyError("not a manifest this version reads", where=path, expected=f"format {FORMAT}", got=got)
    if data["format"] == FORMAT:
        seal = len(_SEAL % "") + 64
        if raw[-seal:] != (_SEAL % hashlib.sha256(raw[:-seal]).hexdigest()).encode():
            raise VerifyError("the manifest is not as it was written", where=path, hint=_DAMAGED)
    if wrong := problem(data):
        raise VerifyError(f"the manifest is malformed: {wrong}", where=path)
    if lacking := [key for key in needed if key not in data]:
        raise CheckpointError(
            f"the manifest lacks {lacking[0]!r}", where=path, hint="an earlier version wrote it: make the output again"
        )
    return {"layer_lists": [], "weights": {}, **data}


def check_belongs(record: Mapping, checkpoint: TensorSource, hint: str) -> ModelView:
    """Whether a manifest tells of this checkpoint: the same layers, with the same tensors.

    Args:
        record: With ``layer_prefix`` and ``num_layers``.
        checkpoint: The output, or what became of it in training.
        hint: What to do where it does not.

    Returns:
        The checkpoint by layer and role.

    Raises:
        CheckpointError: it does not.
    """
    view = view_model(checkpoint.config, tuple(checkpoint.tensors), checkpoint.where)
    head = record["layer_prefix"].split("{layer}")[0]
    found = {name for layer in view.layers for name in layer.values()}
    planned = {name for name in record["tensors"] if name.startswith(head)}
    if view.num_layers != record["num_layers"] or found != planned:
        odd = sorted(found ^ planned)
        raise CheckpointError(
            "the manifest is not this checkpoint's",
            where=checkpoint.where,
            expected=f"{record['num_layers']} layers with {len(planned)} tensors",
            got=f"{view.num_layers} layers with {len(found)} tensors" + (f", odd: {odd[0]}" if odd else ""),
            hint=hint,
        )
    return view


def _origin(plan: Plan, block: BlockPlan, output: OutputTensor, sources: Sequence[TensorSource]) -> dict:
    """How a tensor came about."""
    data = {"action": output.action.value, "dtype": output.dtype, "shape": list(output.shape)}
    if output.action is Action.COPY:
        model = plan.models[block.sources[output.source].model]
        checkpoint, name = model.checkpoint.root(output.stored.name)
        data |= {"model": sources.index(checkpoint), "tensor": name}
    elif output.action is not Action.ZEROS:
        pairs = zip(output.inputs, block.sources, strict=True)
        only = output.source if output.action in UNCHANGED else None
        derived = [s.model for i, (info, s) in enumerate(pairs) if info.derived and only in (None, i)]
        data |= {"derived": derived} if derived else {}
    return data


def _versions() -> dict[str, str]:
    names = ["torch", "safetensors", "transformers", "POT", "scipy", "numpy"]
    names += ["peft"] if importlib.util.find_spec("peft") else []
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
