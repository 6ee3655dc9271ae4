"""The model card of an output: front matter for the hub, how to use and train it, limits, layer map, recipe.

The same plan gives the same card, as long as the cards of its sources stay the same.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from .. import __version__
from ..checkpoint.hub import PRIVATE, split_adapter
from ..core.errors import printable
from ..core.tensors import Action
from ..core.typed_json import parse
from ..core.units import format_count
from ..models.config_json import class_names
from ..models.tokenizer.files import is_tokenizer_file
from ..plan.types import Plan
from .card_metadata import front_matter, join_card, licenses, unnamed
from .manifest import MANIFEST, RECIPE
from .manifest_parts import Growth, ManifestLayer
from .shareable import shared_name, shared_text

#: The card is for Markdown of the hub; `card_edits` finds these lines again once a model is calibrated or trained.
SAME = "It computes exactly what {base} computes: the new layers add nothing until they are trained."
OTHER = "It does not compute what {base} computes: expect a worse loss until it is trained."
_IN_TITLE = 3  # models
UNTRAINED = "- Its new layers are not trained: it is a start for training, not better than {base}."


def model_card(plan: Plan, recipe_yaml: str, ancestors: Sequence[Growth] = ()) -> str:
    """The model card: Markdown with YAML front matter.

    Args:
        plan: The plan that was run.
        recipe_yaml: The recipe as its user wrote it, without folders of this machine.
        ancestors: Earlier growths of the sources (`lineage.ancestors`).
    """
    names, private = ["+".join(parts) for parts in _sources(plan)], PRIVATE in recipe_yaml
    base = _markdown(_name(str(plan.donor.ref)))
    depth = plan.donor.view.num_layers
    title = _markdown(" + ".join(names)) if 1 < len(names) <= _IN_TITLE else base
    lines = [f"# {title}, {plan.num_layers} layers", ""]
    lines.append(
        f"Written by deus_merge {__version__} from {_markdown(', '.join(names))}: {depth} → {plan.num_layers} layers,"
        f" {_parameters(plan)}."
    )
    if plan.function_preserving and plan.new_layers:
        lines.append(SAME.format(base=base))
    elif plan.new_layers:
        lines.append(OTHER.format(base=base))
    lines += [f"\nNote: {_markdown(_without_folders(warning, plan))}." for warning in plan.warnings]
    if ancestors:
        history = "; ".join(f"{_grown(a)} by plan {_markdown(a.plan_hash[:8])}" for a in ancestors)
        lines += ["", f"Earlier growths, oldest first (layers as numbered here): {history}."]
    lines += ["", "## Use", "", *_loading(plan), ""]
    if plan.new_layers:
        lines += ["## Training", "", *_training(plan), ""]
    lines += ["## Limits", "", *_limits(plan, base)]
    maps = [(f"Layers of {d.name}", d.plan.layer_map()) for d in plan.documents] + [("Layers", plan.layer_map())]
    maps += [(f"Layers of {name}", part["layers"]) for name, part in plan.module_maps().items()]
    for title, entries in ((t, e) for t, e in maps if e):
        lines += ["", f"## {_markdown(title)}", "", "| layer | from | how |", "|---|---|---|"]
        lines += [f"| {layers} | {_markdown(origin)} | {how} |" for layers, origin, how in _layer_rows(entries)]
    lines += ["", "## Recipe", "", "As it was written" + (", without folders of its author." if private else ".")]
    lines += [f"`{RECIPE}` is the same, expanded, with local models as seen from this folder:"]
    lines += [f"`deus-merge merge {RECIPE} NEW_FOLDER` runs this merge again, without what came after it (training, or"]
    lines += ["`deus-merge calibrate`).", ""]
    text = "\n".join(map(printable, recipe_yaml.strip().splitlines()))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    lines += [f"{fence}yaml", text, fence, ""]
    return join_card(front_matter(plan), "\n".join(lines))


def _parameters(plan: Plan) -> str:
    """The number of parameters, in words."""
    all_of_them, new = plan.shape.parameters, plan.shape.new_parameters
    if not new:
        return f"{format_count(all_of_them)} parameters"
    before = format_count(all_of_them - new)
    return f"{before} → {format_count(all_of_them)} parameters ({format_count(new)} new)"


def _loading(plan: Plan) -> list[str]:
    """Lines that load the model in transformers."""
    architecture = next(iter(class_names(plan.config)), "")
    kind = "AutoModel"
    if architecture.endswith("ForCausalLM"):
        kind = "AutoModelForCausalLM"
    elif architecture.isidentifier() and "auto_map" not in plan.config:
        kind = architecture
    code = ", trust_remote_code=True" if "auto_map" in plan.config else ""
    tokenizer = any(is_tokenizer_file(name) for name in plan.files)
    return [
        "```python",
        f"from transformers import {', '.join(sorted([kind, *(['AutoTokenizer'] if tokenizer else [])]))}",
        "",
        'path = "."  # this folder, or its name on the hub',
        f'model = {kind}.from_pretrained(path, dtype="auto"{code})',
        *([f"tokenizer = AutoTokenizer.from_pretrained(path{code})"] if tokenizer else []),
        "```",
    ]


def _training(plan: Plan) -> list[str]:
    """Lines about the new layers and how to train them."""
    new = ", ".join(map(str, plan.new_layers))
    return [
        f"New layers: {new}. All others stay as they are while these are trained. `{MANIFEST}` lists the exact",
        "names of the tensors to train under `new_parameters`.",
        "",
        "```python",
        "from deus_merge import training",
        "",
        "model, tokenizer = training.prepare(path)  # only the new layers train",
        "```",
        "",
        "`deus-merge export-training FOLDER` prints settings for transformers' Trainer; `--for axolotl` or",
        "`--for llama-factory` for these, or why they cannot train these layers alone.",
    ]


def _limits(plan: Plan, base: str) -> list[str]:
    """What a reader should not expect of the model, as a list."""
    lines = [UNTRAINED.format(base=base)] if plan.new_layers else []
    lines.append("- It was not evaluated. What its sources cannot do or do wrong, it may do, too.")
    for name, word in licenses(plan):
        lines.append(f"- Licence of {_markdown(name)}: {_markdown(word)}. Choose this model's licence accordingly.")
    local = [_markdown(name) for name in unnamed(plan)]
    if local:
        lines.append(f"- Not in `base_model`, since the id on the hub is not known: {', '.join(local)}.")
    return lines


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
    return shared_text(text)


def _markdown(text: str) -> str:
    """Text with Markdown and HTML escaped: names come from other people."""
    return re.sub(r"[\\`*\[\]|]", r"\\\g<0>", html.escape(printable(text), quote=False))
