"""The model card of an output: front matter for the hub, layer map, recipe. The same plan gives the same card."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import yaml

from .. import __version__
from ..checkpoint.hub import split_adapter
from ..core.errors import printable
from ..core.tensors import Action
from ..core.typed_json import parse
from ..plan.types import Plan
from .manifest_parts import Calibration, Growth, ManifestLayer
from .shareable import shared_name

_SAME = re.compile(r"^It computes exactly what .* computes: the new layers add nothing until they are trained\.$", re.M)


def model_card(plan: Plan, recipe_yaml: str, ancestors: Sequence[Growth] = ()) -> str:
    """The model card: Markdown with YAML front matter.

    Args:
        plan: The plan that was run.
        recipe_yaml: The resolved recipe, without folders of this machine.
        ancestors: Earlier growths of the sources (`lineage.ancestors`).
    """
    sources = _sources(plan)
    names = ["+".join(parts) for parts in sources]
    front = {
        "base_model": list(dict.fromkeys(part for parts in sources for part in parts)),
        "library_name": "transformers",
        "tags": ["merge", "deus_merge", *(["depth-up-scaling"] if plan.new_layers else [])],
    }
    base = _markdown(_name(str(plan.donor.ref)))
    depth = plan.donor.view.num_layers
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {base}, {plan.num_layers} layers",
        "",
    ]
    lines.append(
        f"Written by deus_merge {__version__} from {_markdown(', '.join(names))}: {depth} → {plan.num_layers} layers."
    )
    if plan.function_preserving and plan.new_layers:
        lines.append(f"It computes exactly what {base} computes: the new layers add nothing until they are trained.")
    elif plan.new_layers:
        lines.append(f"It does not compute what {base} computes: expect a worse loss until it is trained.")
    lines += [f"\nNote: {_markdown(_without_folders(warning, plan))}." for warning in plan.warnings]
    if ancestors:
        history = "; ".join(f"{_grown(a)} by plan {_markdown(a.plan_hash[:8])}" for a in ancestors)
        lines += ["", f"Earlier growths, oldest first (layers as numbered here): {history}."]
    if plan.new_layers:
        new = ", ".join(map(str, plan.new_layers))
        lines += ["", "## Training", "", f"New layers: {new}. `deus_merge.json` lists the exact names of their"]
        lines.append(
            "tensors under `new_parameters`. `deus_merge.training.freeze_base(model, folder)` freezes all others;"
        )
        lines.append("`deus-merge export-training` prints settings for trainers.")
    maps = [(f"Layers of {d.name}", d.plan.layer_map()) for d in plan.documents] + [("Layers", plan.layer_map())]
    maps += [(f"Layers of {name}", part["layers"]) for name, part in plan.module_maps().items()]
    for title, entries in ((t, e) for t, e in maps if e):
        lines += ["", f"## {_markdown(title)}", "", "| layer | from | how |", "|---|---|---|"]
        lines += [f"| {layers} | {_markdown(origin)} | {how} |" for layers, origin, how in _layer_rows(entries)]
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", recipe_yaml)), default=0))
    lines += ["", "## Recipe", "", f"{fence}yaml", recipe_yaml.strip(), fence, ""]
    return "\n".join(lines)


def calibrated_card(card: str, record: Calibration) -> str:
    """A model card that says that the outputs of new layers were set, in place of that they add nothing.

    Args:
        card: The card of the model that was calibrated; its user may have edited it.
        record: The calibration.
    """
    set_layers = ", ".join(str(layer.layer) for layer in record.layers if layer.tensors)
    if not set_layers:
        return card
    text = (
        f"The outputs of its new layers {set_layers} were set in closed form ({record.method}) from {record.tokens}"
        f" tokens of a text, which count as training tokens. Loss of {record.held_out_tokens} tokens that were held"
        f" out to choose the step: {record.loss_before:.4f} before, {record.loss_after:.4f} after."
    )
    if _SAME.search(card):
        return _SAME.sub(lambda _: text, card, count=1)
    return f"{card.rstrip()}\n\n{text}\n"


def _sources(plan: Plan) -> list[tuple[str, ...]]:
    """The models that it was made from, each with its adapter; for a document, the models that were used in it."""
    documents = {d.name for d in plan.documents}
    found: dict[tuple[str, ...], None] = {}
    for part in (*(d.plan for d in plan.documents), plan):
        for model, adapter in (split_adapter(str(m.ref)) for m in part.models):
            names = (None if model in documents else model, adapter)
            found[tuple(_name(name) for name in names if name)] = None
    return [parts for parts in found if parts]


def _grown(ancestor: Growth) -> str:
    layers = ", ".join(map(str, ancestor.new_layers)) or "none left"
    return f"layers {layers}, then trained," if ancestor.trained else f"layers {layers}"


def _layer_rows(layer_map: Sequence[Mapping]) -> Iterator[tuple[str, str, str]]:
    """The layer map: layers, sources and how; runs of copied layers share a row."""

    def run_key(layer: ManifestLayer) -> tuple | None:
        """The same for neighbours that share a row; None for a layer with a row of its own."""
        if layer.new or not set(layer.actions) <= {Action.COPY, Action.DERIVE}:
            return None
        source = layer.sources[0]
        return source.model, layer.layer - source.layer, layer.how

    for key, group in groupby((parse(ManifestLayer, {"diagnostics": (), **entry}) for entry in layer_map), run_key):
        layers = list(group)
        first, last = layers[0], layers[-1]
        if key is not None and len(layers) > 1:
            begin, end = first.sources[0].layer, last.sources[0].layer
            yield f"{first.layer}–{last.layer}", f"{_name(key[0])} {begin}–{end}", key[2]
            continue
        for layer in layers:
            origin = " + ".join(f"{_name(s.model)} {s.layer}" for s in layer.sources)
            yield str(layer.layer), origin, f"{layer.how} ({layer.method}), new" if layer.new else layer.how


def _name(ref: str) -> str:
    """A model's name without the folders of the person who ran the merge."""
    return printable(shared_name(ref))


def _without_folders(text: str, plan: Plan) -> str:
    """A warning with models by their names."""
    plans = (plan, *(document.plan for document in plan.documents))
    models = [model for part in plans for model in part.models]
    paths = {part for m in models for part in split_adapter(str(m.ref)) if part is not None}
    paths |= {str(folder) for m in models for folder in m.checkpoint.folders}
    for path in sorted(filter(os.path.isabs, paths), key=len, reverse=True):
        text = text.replace(path, shared_name(path))
    return text


def _markdown(text: str) -> str:
    """Text with Markdown and HTML escaped: names come from other people."""
    return re.sub(r"[\\`*\[\]|]", r"\\\g<0>", html.escape(printable(text), quote=False))
