"""What merge methods reported about their alignments: a table for each value, and pictures of heads and experts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from ..manifest_parts import ManifestLayer, TensorDiagnostics
from . import figures
from .layer_map import short_name

#: key of the diagnostics -> its term, its format, and how the experts of a layer are put together
_METRICS = {
    "cosine": ("cosine", figures.cosine, "mean"),
    "transport_cost": ("transport cost", figures.number, "mean"),
    "effective_support": ("effective support", figures.number, "mean"),
    "marginal_error": ("marginal error", figures.number, "max"),
    "iterations": ("iterations", figures.count, "max"),
    "seconds": ("time of the solver", figures.seconds, "sum"),
}
_TOGETHER = {"mean": lambda values: sum(values) / len(values), "max": max, "sum": sum}
_HEADS = {"value_cosine": "heads: values", "query_key_cosine": "heads: queries and keys"}
_EXPERT = re.compile(r"experts\.\d+\.")
_SIZE = 96  # of a picture
_PICTURES = {"queries": "query heads", "experts": "experts"}


def tables(layers: Sequence[ManifestLayer]) -> list[dict[str, Any]]:
    """The tables of all metrics that were reported: layers by roles, shaded by the value."""
    return [found for key in _METRICS if (found := _table(layers, key))]


def _table(layers: Sequence[ManifestLayer], key: str) -> dict[str, Any] | None:
    term, form, together = _METRICS[key]
    rows: dict[str, dict[str, dict[str, list[float]]]] = {}  # row -> column -> key -> values
    tensors: dict[str, str] = {}
    for layer in layers:
        for d in layer.diagnostics:
            for column, name in _columns(d, key):
                value = d.get(name)
                if not figures.is_number(value):
                    continue
                cell = rows.setdefault(_row(layer, d), {}).setdefault(column, {})
                cell.setdefault("after", []).append(value)
                before = d.get(f"{name}_before")
                if figures.is_number(before):
                    cell.setdefault("before", []).append(before)
                tensors.setdefault(column, _tensor(d["tensor"]) if column not in _HEADS.values() else "")
    if not rows:
        return None
    merge = _TOGETHER[together]
    known = {
        row: {c: {k: merge(v) for k, v in cell.items()} for c, cell in cells.items()} for row, cells in rows.items()
    }
    values = [cell["after"] for cells in known.values() for cell in cells.values()]
    low, span = min(values), max(values) - min(values)

    def shown(cell: Mapping[str, float] | None) -> dict[str, str | None]:
        if cell is None:
            return {"before": None, "after": figures.MISSING, "shade": "0"}
        depth = 0.05 + 0.7 * (cell["after"] - low) / span if 0 < span < math.inf else 0.0
        return {
            "before": form(cell["before"]) if "before" in cell else None,
            "after": form(cell["after"]),
            "shade": f"{depth:.3f}",
        }

    lines = [(row, [shown(cells.get(column)) for column in tensors]) for row, cells in known.items()]
    return {
        "term": term, "columns": tensors, "rows": lines, "open": key in ("cosine", "transport_cost"),
        "experts": any(column.startswith("experts.*.") for column in tensors),
    }  # fmt: skip


def _columns(d: TensorDiagnostics, key: str) -> list[tuple[str, str]]:
    """The columns that a line of diagnostics has values for, each with the key of its value."""
    heads = [(column, name) for name, column in _HEADS.items() if name in d] if key == "cosine" else []
    return [(_EXPERT.sub("experts.*.", d["role"]), key), *heads]


def _row(layer: ManifestLayer, d: TensorDiagnostics) -> str:
    """A layer, and which of its sources was aligned where that is not the only one."""
    source = d.get("source")
    if isinstance(source, int) and 0 <= source < len(layer.sources) and len(layer.sources) > 2:
        return f"{layer.layer} · {short_name(layer.sources[source].model)}"
    return str(layer.layer)


def _tensor(name: str) -> str:
    """The name of a tensor for any layer and expert."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def pictures(layers: Sequence[ManifestLayer]) -> list[dict[str, Any]]:
    """Which of A's heads, or experts, take the place of which of B's: for each kind the pictures of all layers."""
    found: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        for d in layer.diagnostics:
            for key, kind in _PICTURES.items():
                if _is_order(order := d.get(key)):
                    found.setdefault(kind, []).append(_picture(_row(layer, d), order))
    return [{"kind": kind, "plans": plans, "open": len(plans) <= 32} for kind, plans in found.items()]


def _is_order(value: object) -> TypeGuard[Sequence[int]]:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(type(x) is int for x in value)


def _picture(layer: str, order: Sequence[int]) -> dict[str, Any]:
    """One cell for each of B's (across), at the one of A's (down) that takes its place."""
    cell = _SIZE / max(1, len(order))
    cells = [{"x": f"{target * cell:.2f}", "y": f"{one * cell:.2f}"} for target, one in enumerate(order)]
    moved = sum(target != one for target, one in enumerate(order))
    return {"layer": layer, "size": _SIZE, "cell": f"{cell:.2f}", "cells": cells, "moved": moved, "count": len(order)}
