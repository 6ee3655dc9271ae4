"""The model card of an output: front matter for the hub, layer map, recipe. The same plan gives the same card."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import yaml

from .. import __version__
from ..errors import printable
from ..plan import Plan


def model_card(plan: Plan, recipe_yaml: str) -> str:
    """Markdown with YAML front matter.

    Args:
        plan: What was run.
        recipe_yaml: The resolved recipe.
    """
    names = [_name(str(m.ref)) for m in plan.models]
    for model in plan.models:  # a card is published: it names no folder of its author
        recipe_yaml = recipe_yaml.replace(str(model.checkpoint.folder), _name(str(model.ref)))
    front = {
        "base_model": names,
        "library_name": "transformers",
        "tags": ["merge", "deus_merge", *(["depth-up-scaling"] if plan.new_layers else [])],
    }
    base = _markdown(names[plan.donor])
    depth = plan.models[plan.donor].view.num_layers
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {base}, {plan.num_layers} layers",
        "",
    ]
    lines.append(
        f"Made by deus_merge {__version__} from {_markdown(', '.join(names))}: {depth} → {plan.num_layers} layers."
    )
    if plan.function_preserving and plan.new_layers:
        lines.append(f"It computes exactly what {base} computes: the new layers add nothing until they are trained.")
    elif plan.new_layers:
        lines.append(f"It does not compute what {base} computes: expect a worse loss until it is trained.")
    lines += [f"\nNote: {_markdown(warning)}." for warning in plan.warnings]
    if plan.new_layers:
        new = ", ".join(map(str, plan.new_layers))
        lines += ["", "## Training", "", f"New layers: {new}. `deus_merge.json` lists the exact names of their"]
        lines.append("tensors under `new_parameters`; to train only what is new, freeze all others.")
    lines += ["", "## Layers", "", "| layer | from | how |", "|---|---|---|"]
    lines += [f"| {layers} | {_markdown(origin)} | {how} |" for layers, origin, how in _layer_rows(plan)]
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", recipe_yaml)), default=0))
    lines += ["", "## Recipe", "", f"{fence}yaml", recipe_yaml.strip(), fence, ""]
    return "\n".join(lines)


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
    return printable(name)


def _markdown(text: str) -> str:
    """Text that Markdown and HTML leave as it is: a name may be anybody's."""
    return re.sub(r"[\\`*\[\]|]", r"\\\g<0>", html.escape(printable(text), quote=False))
