"""``methods``: the catalogue of merge methods, solvers, families, formats and presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
import yaml

from .. import api
from ..core.located import Plain
from .completion import complete_methods
from .output import echo_wrapped, emit_json, table

#: kinds of entries of `recipe.catalog` -> one of them
_SINGULAR = {
    "methods": "method", "alignments": "alignment", "solvers": "solver", "families": "family",
    "formats": "format of quantised weights", "presets": "preset",
}  # fmt: skip


def _flow(value: Plain | tuple) -> str:
    """The value as a recipe writes it, on one line."""
    if isinstance(value, str):
        return value
    data = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(data, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


@click.command()
@click.argument("name", required=False, shell_complete=complete_methods)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON on stdout.")
def methods(name: str | None, as_json: bool):
    """List merge methods, solvers, families, formats of quantised weights and presets; with NAME, which may be a
    model_type, one in detail.

    \b
    Example:
      deus-merge methods ot_fuse
    """
    if name is None:
        everything = api.methods()
        if as_json:
            emit_json(everything)
            return
        for kind, entries in everything.items():
            table(kind, ["name", "description"], [[n, e["summary"]] for n, e in entries.items()])
            click.echo()
        return
    found = {kind: next(iter(entries.items())) for kind, entries in api.methods(name).items()}
    if as_json:
        emit_json({kind: entry for kind, (_, entry) in found.items()})
        return
    for kind, (name, entry) in found.items():
        echo_wrapped(f"{name} ({_SINGULAR[kind]}): {entry['summary']}")
        echo_wrapped(f"reference: {entry['reference']}")
        click.echo()
        if parameters := entry.get("parameters"):
            columns = ["parameter", "values", "default", "description"]
            table("", columns, [[p["name"], p["values"], _flow(p["default"]), p["help"]] for p in parameters])
        if kind == "families":
            _show_abilities(entry)
        if kind == "formats":
            click.echo(f"modules in floating point are named in: {entry['exceptions']}")
            click.echo(f"quantize_new: {'yes' if entry['quantize_new'] else 'no, new layers are in floating point'}")
        if kind == "presets":
            click.echo(f"default insert: {_flow(entry['insert'] or 'the number of layers in its paper')}")
            if entry["settings"] is not None:
                click.echo(f"parameters of {entry['method']}: {_flow(entry['settings'] or 'its defaults')}")


def _show_abilities(entry: Mapping[str, Any]) -> None:
    """What can be done with the layers of a family."""
    from ..models.abilities import STEPS

    zero = ", ".join(entry["writers"])
    rows = [
        ["layers", "; ".join(entry["kinds"])],
        ["identity", f"no: {entry['identity']}" if entry["identity"] else f"yes, with zeros in {zero}"],
        ["aligned and fused", ", ".join(entry["aligned"]) or "nothing"],
        ["taken from one parent", ", ".join(entry["copied"]) or "nothing"],
        ["symmetry", ", ".join(f"{step} ({STEPS[step]})" for step in entry["steps"]) or "none"],
        *([f"no {step}", reason] for step, reason in entry["without"].items()),
        *([f"with {condition}", what] for condition, what in entry["cases"].items()),
    ]
    table("", ["new layers", ""], rows)
