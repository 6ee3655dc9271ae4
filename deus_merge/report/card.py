"""The model card of an output: front matter for the hub, layer map, recipe. The same plan gives the same card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import yaml

from .. import __version__
from ..errors import printable
from ..plan import Plan


def model_card(plan: Plan, recipe_yaml: str, ancestors: Sequence[Mapping] = ()) -> str:
    """Markdown with YAML front matter.

    Args:
        plan: What was run.
        recipe_yaml: The resolved recipe.
        ancestors: Earlier growths of the sources (`lineage.ancestors`).
    """
    names = [_name(str(m.ref)) for m in plan.models]
    for model in plan.models:  # a card is published: it names no folder of its author
        recipe_yaml = recipe_yaml.replace(str(model.checkpoint.folder), _name(str(model.ref)))
    front = {
        "base_model": names,
        "library_name": "transformers",
        "tags": ["merge", "deus_merge", *(["depth-up-scaling"] if plan.new_layers else [])],
    }
    base = names[plan.donor]
    depth = plan.models[plan.donor].view.num_layers
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {base}, {plan.num_layers} layers",
        "",
    ]
    lines.append(f"Made by deus_merge {__version__} from {', '.join(names)}: {depth} → {plan.num_layers} layers.")
    if plan.function_preserving and plan.new_layers:
        lines.append(f"It computes exactly what {base} computes: the new layers add nothing until they are trained.")
    elif plan.new_layers:
        lines.append(f"It does not compute what {base} computes: expect a worse loss until it is trained.")
    lines += [f"\nNote: {warning}." for warning in plan.warnings]
    if ancestors:
        told = "; ".join(f"{_grown(a)} by plan {printable(a['plan_hash'])[:8]}" for a in ancestors)
        lines += ["", f"Grown before, oldest first (layers as numbered here): {told}."]
    if plan.new_layers:
        new = ", ".join(map(str, plan.new_layers))
        lines += ["", "## Training", "", f"New layers: {new}. `deus_merge.json` lists the exact names of their"]
        lines.append(
            "tensors under `new_parameters`. `deus_merge.training.freeze_base(model, folder)` freezes all others;"
        )
        lines.append("`deus-merge export-training` prints settings for trainers.")
    lines += ["", "## Layers", "", "| layer | from | how |", "|---|---|---|"]
    lines += [f"| {layers} | {origin} | {how} |" for layers, origin, how in _layer_rows(plan)]
    lines += ["", "## Recipe", "", "```yaml", recipe_yaml.strip(), "```", ""]
    return "\n".join(lines)


def _grown(ancestor: Mapping) -> str:
    layers = ", ".join(map(str, ancestor["new_layers"])) or "none left"
    return f"layers {layers}, then trained," if ancestor["trained"] else f"layers {layers}"


def _layer_rows(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """The layer map, with runs of copied layers on one line."""

    def source(entry: dict) -> tuple | None:
        """What neighbours must share to stand on one line."""
        only = entry["sources"][0]
        shift = entry["layer"] - only["layer"]
        return None if entry["new"] or entry["kind"] != "copy" else (only["model"], shift)

    for key, group in groupby(plan.layer_map(), source):
        entries = list(group)
        first, last = entries[0], entries[-1]
        if key is not None and len(entries) > 1:
            begin, end = first["sources"][0]["layer"], last["sources"][0]["layer"]
            yield f"{first['layer']}–{last['layer']}", f"{_name(key[0])} {begin}–{end}", "copy"
            continue
        for entry in entries:
            origin = " + ".join(f"{_name(s['model'])} {s['layer']}" for s in entry["sources"])
            yield str(entry["layer"]), origin, f"{entry['method']}, new" if entry["new"] else entry["kind"]


def _name(ref: str) -> str:
    """A model's name without the folders of whoever ran the merge."""
    name = Path(ref).name if Path(ref).exists() else ref
    return printable(name).replace("|", "\\|")
