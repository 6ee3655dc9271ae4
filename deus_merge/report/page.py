"""``report``: one self-contained HTML page about an output, without scripts, links and fonts.

Texts come from recipes and models that somebody else wrote, so the template escapes them all; styles and coordinates
are computed here, from numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..core.errors import printable
from ..core.tensors import Action
from ..core.units import format_size
from .manifest import Manifest
from .manifest_parts import ManifestLayer, TensorDiagnostics

REPORT = "report.html"

#: tables about the transport plans: key of the diagnostics, and title
_METRICS = (
    ("cosine", "Mean cosine of the rows (or neurons) of both layers after the alignment"),
    ("transport_cost", "Transport cost"),
    ("effective_support", "Effective support: rows of A that contribute to a row of B"),
    ("marginal_error", "Marginal error of the plan (L1)"),
    ("iterations", "Iterations"),
    ("seconds", "Seconds of the solver"),
)
_HEADS = {"value_cosine": "heads: values", "query_key_cosine": "heads: queries and keys"}
_WIDTH, _LEFT, _RIGHT, _BOX = 920, 0, 700, 220  # of the layer map
_MATRIX = 96  # of a head plan


def render_page(manifest: Manifest, recipe: str, verification: Mapping) -> str:
    """The page about one output.

    Args:
        manifest: The output's manifest.
        recipe: The text of ``deus_merge.yml``.
        verification: The output of `verify.Verification.describe`.

    Returns:
        HTML.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("deus_merge.report", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"short": short, "plain": plain, "loss": "{:.4f}".format}
    diagnostics = [(layer.layer, d) for layer in manifest.layers for d in layer.diagnostics]
    sources = [
        {"model": s.model, "fingerprint": s.fingerprint, "name": _name(s.model), "layers": depth}
        for s, depth in zip(manifest.sources, _depths(manifest), strict=True)
    ]
    sizes = [file.bytes for file in manifest.weights.values()]
    return environment.get_template("page.html").render(
        manifest=manifest,
        recipe=plain(recipe),
        verification=verification,
        counts={mark: sum(c["passed"] is mark for c in verification["checks"]) for mark in (True, False, None)},
        sources=sources,
        base=sources[manifest.donor],
        size=format_size(sum(sizes)) if sizes else None,
        map=_layer_map(manifest.layers, sources),
        actions=[action.value for action in Action],
        legend={layer.how: _color(layer) for layer in manifest.layers},
        tables=[table for key, title in _METRICS if (table := _metric_table(diagnostics, key, title))],
        heads=[_head_plan(layer, d["queries"]) for layer, d in diagnostics if "queries" in d],
        seconds=manifest.options.get("seconds"),
        quick=all(check["name"] != "transformers" for check in verification["checks"]),
    )


def _color(layer: ManifestLayer) -> str:
    """The CSS class of a layer: the one of its actions that changes its values most."""
    return next((action.value for action in reversed(Action) if action in layer.actions), "other")


def short(value: object) -> str:
    """A number, rounded for reading; a dash for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def plain(text: object) -> str:
    """Text with its lines, but without other control characters."""
    return "\n".join(map(printable, str(text).splitlines()))


def _name(ref: str) -> str:
    """A model's name without the folders that it is in."""
    return Path(ref).name if Path(ref).is_absolute() else ref


def _depths(manifest: Manifest) -> list[int]:
    """The number of layers of each source; where the manifest does not say it, of those that were used."""
    used: dict[str, int] = {}
    for source in (s for layer in manifest.layers for s in layer.sources):
        used[source.model] = max(used.get(source.model, 0), source.layer + 1)
    return [s.layers if s.layers is not None else used.get(s.model, 0) for s in manifest.sources]


def _layer_map(layers: Sequence[ManifestLayer], sources: Sequence[Mapping]) -> dict:
    """Boxes and curves of the picture: the sources' layers on the left, the output's layers on the right."""
    height = min(1400, max(160, 15 * len(layers)))
    gap = 24  # in front of each source, for its name
    step = (height - gap * len(sources)) / max(1, sum(s["layers"] for s in sources))
    boxes, titles, centers, at = [], [], {}, 0.0
    for source in sources:
        titles.append({"y": at + gap - 8, "text": source["name"]})
        at += gap
        for layer in range(source["layers"]):
            centers[source["model"], layer] = at + step / 2
            boxes.append({"x": _LEFT, "y": at, "height": step, "label": layer, "color": "source", "about": ""})
            at += step
    links = []
    row = (height - gap) / max(1, len(layers))
    for layer in layers:
        y = gap + layer.layer * row
        color = _color(layer)
        origin = " + ".join(f"{_name(s.model)} {s.layer}" for s in layer.sources)
        about = f"layer {layer.layer}: {layer.how} of {origin} ({layer.method})"
        boxes.append({"x": _RIGHT, "y": y, "height": row, "label": layer.layer, "color": color, "about": about})
        for source in layer.sources:
            start, end = centers[source.model, source.layer], y + row / 2
            x1, x2, bend = _LEFT + _BOX, _RIGHT, (_RIGHT - _LEFT - _BOX) / 2
            path = f"M{x1} {start:.1f} C{x1 + bend:.0f} {start:.1f} {x2 - bend:.0f} {end:.1f} {x2} {end:.1f}"
            links.append({"path": path, "color": color})
    return {
        "width": _WIDTH, "height": height, "box": _BOX, "right": _RIGHT, "text": min(step, row) >= 9,
        "boxes": boxes, "titles": titles, "links": links,
    }  # fmt: skip


def _metric_table(diagnostics: Sequence[tuple[int, TensorDiagnostics]], key: str, title: str) -> dict | None:
    """Layers by roles, shaded by the value.

    Args:
        diagnostics: Layer numbers, each with the diagnostics of a tensor.
        key: The key of the value.
        title: The title of the table.

    Returns:
        The table; None where no diagnostics have the key.
    """
    rows: dict[int, dict[str, float]] = {}
    for layer, d in diagnostics:
        found = {d["role"]: d.get(key)}
        if key == "cosine":
            found |= {name: d.get(head) for head, name in _HEADS.items()}
        rows.setdefault(layer, {}).update({k: v for k, v in found.items() if v is not None and short(v) != "–"})
    columns = list(dict.fromkeys(role for row in rows.values() for role in row))
    if not columns:
        return None
    values = [v for row in rows.values() for v in row.values()]
    low, span = min(values), max(values) - min(values)

    def cell(value: float | None) -> dict:
        depth = 0.0 if value is None or span == 0 else 0.05 + 0.7 * (value - low) / span
        return {"value": value, "shade": f"{depth:.3f}"}

    lines = [(layer, [cell(row.get(c)) for c in columns]) for layer, row in rows.items() if row]
    return {"title": title, "columns": columns, "rows": lines, "open": key in ("cosine", "transport_cost")}


def _head_plan(layer: int, queries: Sequence[int]) -> dict:
    """The plan between query heads as a picture: one cell for each head of B, at the head of A that takes its place."""
    cell = _MATRIX / max(1, len(queries))
    cells = [{"x": target * cell, "y": head * cell} for target, head in enumerate(queries)]
    moved = sum(target != head for target, head in enumerate(queries))
    return {"layer": layer, "size": _MATRIX, "cell": cell, "cells": cells, "moved": moved, "heads": len(queries)}
