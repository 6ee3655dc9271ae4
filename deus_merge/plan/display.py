"""A plan in one line, and as a table of HTML for notebooks: neighbouring layers that come about alike in one row."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from ..core.tables import html_titled
from ..core.text import plural
from ..core.units import format_count, format_size

if TYPE_CHECKING:
    from .types import Plan


def short_text(plan: Plan) -> str:
    """Layers, parameters and bytes of a plan in one line."""
    shape, new = plan.shape, len(plan.new_layers)
    return (
        f"{plan.donor.view.num_layers} -> {plural(plan.num_layers, 'layer')}, {new} new; "
        f"{format_count(shape.parameters)} parameters, {format_count(shape.new_parameters)} new; "
        f"writes {format_size(plan.bytes_written)} in {plural(len(plan.shards), 'file')}"
    )


def html_text(plan: Plan) -> str:
    """`short_text` above the layer map."""
    rows = []
    for _, group in groupby(enumerate(plan.layer_map()), key=lambda entry: _likeness(*entry)):
        entries = [entry for _, entry in group]
        first, last = entries[0], entries[-1]
        ends = zip(first["sources"], last["sources"], strict=True)
        sources = [f"{one['model']} {_span(one['layer'], other['layer'])}".strip() for one, other in ends]
        how, new = ", ".join(first["actions"]), "new" if first["new"] else ""
        rows.append([_span(first["layer"], last["layer"]), " + ".join(sources), first["method"], how, new])
    return html_titled(short_text(plan), ["layer", "from", "method", "how", ""], rows)


def _span(first: int | None, last: int | None) -> str:
    """The numbers of neighbouring layers; nothing for what is not a layer."""
    return "" if first is None else str(first) if first == last else f"{first}–{last}"


def _likeness(index: int, entry: dict) -> tuple:
    """What neighbouring layers of one row share: everything but their numbers, which rise by one."""
    sources = tuple((s["model"], None if s["layer"] is None else s["layer"] - index) for s in entry["sources"])
    return entry["new"], entry["method"], tuple(entry["actions"]), sources
