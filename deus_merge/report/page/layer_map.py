"""The picture of a stack of layers: the sources' layers on the left, the output's on the right, curves between them.

Boxes are HTML and the curves are one picture that stretches, so that numbers keep their size on any screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ...checkpoint.hub import split_adapter
from ...core.tensors import Action
from ..manifest_parts import ManifestLayer

_ROW = 16  # px: the least height of a layer, so that its number can be read
_NAME = 26  # px in front of each source, for its name


def short_name(ref: str) -> str:
    """A model's name without the folders that it is in."""
    parts = (part for part in split_adapter(ref) if part is not None)
    local = (Path(part).name or part if Path(part).is_absolute() or part.startswith(".") else part for part in parts)
    return "+".join(local)


def color(layer: ManifestLayer) -> str:
    """The CSS class of a layer: the one of its actions that changes its values most."""
    return next((action.value for action in reversed(Action) if action in layer.actions), "other")


def layer_map(layers: Sequence[ManifestLayer], depths: Mapping[str, int]) -> dict[str, Any]:
    """Boxes and curves of a stack.

    Args:
        layers: The output's layers.
        depths: The number of layers of each source.
    """
    sources = {model: depth for model, depth in depths.items() if depth}
    names = _NAME * max(1, len(sources))
    height = names + _ROW * max(1, sum(sources.values()), len(layers) + 1 - len(sources))
    step = (height - names) / max(1, sum(sources.values()))
    row = (height - _NAME) / max(1, len(layers))
    left, titles, centers, at = [], [], {}, 0.0
    for model, depth in sources.items():
        titles.append({"top": f"{at:.1f}", "text": short_name(model)})
        at += _NAME
        for layer in range(depth):
            centers[model, layer] = at + step / 2
            left.append({"top": f"{at:.1f}", "height": f"{step - 1:.1f}", "layer": layer, "model": short_name(model)})
            at += step
    right, links = [], []
    for index, layer in enumerate(layers):
        top = _NAME + index * row
        shared = {"color": color(layer), "layer": layer.layer, "how": layer.how, "new": layer.new}
        right.append(
            {**shared, "top": f"{top:.1f}", "height": f"{row - 1:.1f}", "origin": origin(layer), "method": layer.method}
        )
        for source in layer.sources:
            if (start := centers.get((source.model, source.layer))) is not None:
                end = top + row / 2
                path = f"M0 {start:.1f} C50 {start:.1f} 50 {end:.1f} 100 {end:.1f}"
                links.append({"path": path, "color": color(layer)})
    return {"height": round(height), "titles": titles, "left": left, "right": right, "links": links}


def origin(layer: ManifestLayer) -> str:
    """The layers that a layer was made from, in words."""
    return " + ".join(f"{short_name(s.model)} {s.layer}" for s in layer.sources)


def layer_table(layers: Sequence[ManifestLayer]) -> list[dict[str, Any]]:
    """Rows of a table: neighbouring layers that come about alike share one."""

    def alike(entry: tuple[int, ManifestLayer]) -> tuple:
        index, layer = entry
        return layer.new, layer.method, layer.actions, tuple((s.model, s.layer - index) for s in layer.sources)

    rows = []
    for _, group in groupby(enumerate(layers), alike):
        found = [layer for _, layer in group]
        first, last = found[0], found[-1]
        ends = zip(first.sources, last.sources, strict=True)
        rows.append({
            "layers": _span(first.layer, last.layer), "how": first.actions, "method": first.method, "new": first.new,
            "from": " + ".join(f"{short_name(a.model)} {_span(a.layer, b.layer)}" for a, b in ends),
        })  # fmt: skip
    return rows


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"
