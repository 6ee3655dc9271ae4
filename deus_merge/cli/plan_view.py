"""Plans as text: the layer map, in which neighbours that come about alike share a row, and the totals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import click

from ..core.text import plural
from ..core.units import dtype_name, format_count, format_seconds, format_size
from ..core.urls import place_name
from ..methods.registry import methods
from ..plan.blocks import BlockPlan, actions_of
from ..plan.fit import Fit
from ..plan.training_memory import TrainingMemory, TrainingSettings
from ..plan.types import Plan, quantized_of
from ..run.pieces import Share
from .output import echo_wrapped, emit_json, note, table, warn


def show_plan(plan: Plan, training: TrainingSettings | None = None) -> None:
    """Print the layer map and the totals, after those of the documents that the plan needs.

    Args:
        plan: The plan.
        training: How the new layers are trained; None for the defaults.
    """
    for document in plan.documents:
        count = sum(document.runs.values())
        cached = f"{document.cached_blocks} at a time in memory"
        made = "is computed when it is read" if count == 1 else "are computed when they are read"
        how = f"{plural(count, 'block')} {made}, {cached}" if count else "only copied from"
        echo_wrapped(f"document {document.name}, not written: {how}")
        _layer_table(document.plan)
        click.echo()
    _layer_table(plan)
    click.echo()
    if vocabulary := plan.vocabulary:
        counts = plural(vocabulary["tokens"], "token"), plural(vocabulary["rows"], "row")
        echo_wrapped(f"tokenizer {vocabulary['tokenizer']}: {', '.join(counts)}")
    layers = f"{plan.donor.view.num_layers} -> {plural(plan.num_layers, 'layer')}, {len(plan.new_layers)} new"
    same = "; computes the same function as the base" if plan.function_preserving and not plan.calibration else ""
    echo_wrapped(f"{layers}{same}")
    old, new = plan.shape.parameters - plan.shape.new_parameters, plan.shape.new_parameters
    echo_wrapped(f"{format_count(old)} -> {format_count(old + new)} parameters, {format_count(new)} new")
    if plan.calibration:
        echo_wrapped(str(plan.calibration))
    if any(map(quantized_of, plan.models)):
        dtypes = sorted({dtype_name(o.dtype) for _, o in plan.outputs if not o.quantization})
        written = f"{quantized_text(plan.quantized)}, byte for byte" if plan.quantized else "nothing quantised"
        echo_wrapped(f"writes {written}; all else in {' and '.join(dtypes)}")
    echo_wrapped(
        f"reads {format_size(plan.bytes_read)}, writes {format_size(plan.bytes_written)} in"
        f" {plural(len(plan.shards), 'file')}; about {format_size(plan.peak_memory)} of memory,"
        f" {format_seconds(plan.seconds)}"
    )
    if memory := plan.training_memory(training):
        echo_wrapped(f"training the new layers: {training_text(memory)}")
    click.echo(f"plan {plan.hash}")


def training_text(memory: TrainingMemory) -> str:
    """The estimate of the memory for training in one line."""
    how = memory.settings
    terms = {
        "base": memory.base_weights, "new layers": memory.new_weights, "gradients": memory.gradients,
        how.optimizer: memory.optimizer_states, "copies": memory.copies, "activations": memory.activations,
        "loss": memory.loss, "overhead": memory.overhead,
    }  # fmt: skip
    listed = ", ".join(f"{name} {format_size(size)}" for name, size in terms.items())
    checkpointing = " with checkpointing" if how.checkpointing else ""
    return f"about {format_size(memory.peak)} for {how.batch} x {how.length} tokens{checkpointing} ({listed})"


def fit_text(fit: Fit) -> str:
    """The choice of new layers in one line."""
    places = json.dumps(fit.insert, ensure_ascii=False)
    fits = "fits" if fit.layers == 1 else "fit"
    layers = plural(fit.layers, "new layer")
    return f"{layers} of at most {fit.most} {fits} into {format_size(fit.memory)}: --insert '{places}'"


def quantized_text(share: Mapping[str, Mapping[str, float]]) -> str:
    """`quantized_share` in words."""
    return ", ".join(f"{name}: {plural(int(s['weights']), 'weight')} at {s['bits']} bits" for name, s in share.items())


def show_share(share: Share, out: Path, quiet: bool, as_json: bool) -> None:
    """Print what a worker has made, and what is left."""
    warn(share.warnings)
    if as_json:
        emit_json({
            "made": [piece.name for piece in share.made],
            "found": [piece.name for piece in share.found],
            "left": share.left,
            "complete": share.complete,
            "warnings": list(share.warnings),
        })  # fmt: skip
    found = f", {len(share.found)} finished already" if share.found else ""
    if not (share.made or share.found or share.complete):
        found = ": there are fewer pieces than shares, a smaller --max-shard-size makes more"
    place = place_name(out)
    left = f"{share.left} of the output left" if share.left else f"deus-merge finish puts {place} together"
    left = f"{place} is complete" if share.complete else left
    note(f"{plural(len(share.made), 'piece')} made{found}; {left}", quiet or as_json)


def _layer_table(plan: Plan) -> None:
    """Print the sources of a plan's blocks, with models as letters."""
    letters = {i: chr(ord("A") + i) if i < 26 else f"M{i}" for i in range(len(plan.models))}
    for i, model in enumerate(plan.models):
        view = model.view
        family = view.family.name if view.family else f"{view.model_type} (by tensor names)"
        role = ", base" if model is plan.donor else ""
        codes = f", {quantized_text(share)}" if (share := quantized_of(model)) else ""
        echo_wrapped(f"{letters[i]} = {model.ref}  [{family}, {plural(view.num_layers, 'layer')}{codes}{role}]")
    click.echo()
    rows = []
    for _, group in groupby(enumerate(plan.blocks), key=lambda item: _likeness(*item)):
        blocks = [block for _, block in group]
        one, other = blocks[0], blocks[-1]
        title = one.part_of or (one.title if len(blocks) == 1 else f"layers {one.layers[0]}-{other.layers[0]}")
        ends = zip(one.sources, other.sources, strict=True)
        sources = [f"{letters[a.model]} {_span(a.layer, b.layer)}".strip() for a, b in ends]
        origin = f"{sources[0]} to {sources[-1]}" if methods()[one.method].learns else " + ".join(sources)
        rows.append([title, origin, one.method, " + ".join(actions_of(blocks)), "new" if one.new else ""])
    table("", ["output", "from", "method", "how", ""], rows)


def _span(first: int | None, last: int | None) -> str:
    """The numbers of neighbouring layers; nothing for what is not a layer."""
    return "" if first is None else str(first) if first == last else f"{first}-{last}"


def _likeness(index: int, block: BlockPlan) -> tuple:
    """What blocks of one row share: everything but the numbers of their layers, which rise by one; or the layers that
    they make together. Any other block that is not one layer has a row of its own."""
    if block.part_of:
        return "roles", block.part_of
    if len(block.layers) != 1:
        return (index,)
    sources = tuple((s.model, None if s.layer is None else s.layer - index) for s in block.sources)
    return "layers", block.module, block.layers[0] - index, block.method, block.how, block.new, sources
