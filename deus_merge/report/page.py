"""``report``: one HTML page that tells all about an output, and needs nothing but itself: no script, no link, no font.

Text comes from recipes and models that somebody else wrote, so the template escapes whatever it is given, and what
goes into styles and coordinates is computed here, from numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..core.errors import printable
from ..core.units import format_size

REPORT = "report.html"

#: what is told of each plan: key of the diagnostics, and its title
_METRICS = (
    ("cosine", "Mean cosine of the rows (or neurons) of both layers after the alignment"),
    ("transport_cost", "Transport cost"),
    ("effective_support", "Effective support: rows of A that a row of B is made of"),
    ("marginal_error", "Marginal error of the plan (L1)"),
    ("iterations", "Iterations"),
    ("seconds", "Seconds of the solver"),
)
_HEADS = {"value_cosine": "heads: values", "query_key_cosine": "heads: queries and keys"}
_WIDTH, _LEFT, _RIGHT, _BOX = 920, 0, 700, 220  # of the layer map
_MATRIX = 96  # of a head plan


def render_page(record: Mapping, recipe: str, verification: Mapping) -> str:
    """The page.

    Args:
        record: The manifest.
        recipe: ``deus_merge.yml``.
        verification: As `verify.Verification.describe` tells it.

    Returns:
        HTML.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("deus_merge.report", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"short": short, "plain": plain}
    layers = record["layers"]
    told = [(layer["layer"], d) for layer in layers for d in layer.get("diagnostics", [])]
    sources = [s | {"layers": _depth(s, layers), "name": _name(s["model"])} for s in record["sources"]]
    sizes = [facts["bytes"] for facts in record["weights"].values()]
    return environment.get_template("page.html").render(
        record=record,
        recipe=plain(recipe),
        verification=verification,
        counts={mark: sum(c["passed"] is mark for c in verification["checks"]) for mark in (True, False, None)},
        sources=sources,
        base=sources[record["donor"]],
        size=format_size(sum(sizes)) if sizes else None,
        map=_layer_map(layers, sources),
        kinds={how: _color(how) for how in dict.fromkeys(map(how, layers))},
        tables=[table for key, title in _METRICS if (table := _metric_table(told, key, title))],
        heads=[_head_plan(layer, d) for layer, d in told if "queries" in d],
        seconds=record["options"].get("seconds"),
        quick=all(check["name"] != "transformers" for check in verification["checks"]),
    )


def how(layer: Mapping) -> str:
    """How a layer came about, in words."""
    return " + ".join(layer["actions"])


def _color(words: str) -> str:
    """The CSS class of a layer: that of the action that changes most."""
    names = {
        "compute": "merged",
        "align": "merged",
        "zeros": "zeroed",
        "cast": "cast",
        "derive": "cast",
        "copy": "copy",
    }
    return next((css for action, css in names.items() if action in words.split(" + ")), "other")


def short(value: object) -> str:
    """A number for people; a dash for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def plain(text: object) -> str:
    """Text with its lines, but without other control characters."""
    return "\n".join(map(printable, str(text).splitlines()))


def _name(ref: str) -> str:
    """A model without the folders it is in."""
    return Path(ref).name if Path(ref).is_absolute() else ref


def _depth(source: Mapping, layers: Sequence[Mapping]) -> int:
    """Format 1 of the manifest does not tell how many layers a source has: at least as many as were used."""
    used = [s["layer"] for layer in layers for s in layer["sources"] if s["model"] == source["model"]]
    return source.get("layers") or 1 + max(used, default=-1)


def _layer_map(layers: Sequence[Mapping], sources: Sequence[Mapping]) -> dict:
    """Boxes and curves of the picture: the sources' layers on the left, the output's on the right."""
    height = min(1400, max(160, 15 * len(layers)))
    gap = 24  # in front of each source, for its name
    step = (height - gap * len(sources)) / max(1, sum(s["layers"] for s in sources))
    boxes, titles, places, at = [], [], {}, 0.0
    for source in sources:
        titles.append({"y": at + gap - 8, "text": source["name"]})
        at += gap
        for layer in range(source["layers"]):
            places[source["model"], layer] = at + step / 2
            boxes.append({"x": _LEFT, "y": at, "height": step, "label": layer, "kind": "source", "about": ""})
            at += step
    links = []
    row = (height - gap) / max(1, len(layers))
    for layer in layers:
        y = gap + layer["layer"] * row
        kind = _color(how(layer))
        origin = " + ".join(f"{_name(s['model'])} {s['layer']}" for s in layer["sources"])
        about = f"layer {layer['layer']}: {how(layer)} of {origin} ({layer['method']})"
        boxes.append({"x": _RIGHT, "y": y, "height": row, "label": layer["layer"], "kind": kind, "about": about})
        for source in layer["sources"]:
            start, end = places[source["model"], source["layer"]], y + row / 2
            x1, x2, bend = _LEFT + _BOX, _RIGHT, (_RIGHT - _LEFT - _BOX) / 2
            path = f"M{x1} {start:.1f} C{x1 + bend:.0f} {start:.1f} {x2 - bend:.0f} {end:.1f} {x2} {end:.1f}"
            links.append({"path": path, "kind": kind})
    return {
        "width": _WIDTH, "height": height, "box": _BOX, "right": _RIGHT, "text": min(step, row) >= 9,
        "boxes": boxes, "titles": titles, "links": links,
    }  # fmt: skip


def _metric_table(told: Sequence[tuple[int, Mapping]], key: str, title: str) -> dict | None:
    """Layers by roles, shaded by the value; None when nothing tells it."""
    rows: dict[int, dict[str, float]] = {}
    for layer, d in told:
        found = {d["role"]: d.get(key)}
        if key == "cosine":
            found |= {name: d.get(head) for head, name in _HEADS.items()}
        rows.setdefault(layer, {}).update({k: v for k, v in found.items() if short(v) != "–"})
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


def _head_plan(layer: int, d: Mapping) -> dict:
    """The plan between query heads as a picture: a cell for A's head in B's place."""
    queries: Iterable[int] = d["queries"]
    cell = _MATRIX / max(1, len(queries))
    cells = [{"x": place * cell, "y": head * cell} for place, head in enumerate(queries)]
    moved = sum(place != head for place, head in enumerate(queries))
    return {"layer": layer, "size": _MATRIX, "cell": cell, "cells": cells, "moved": moved, "heads": len(queries)}
