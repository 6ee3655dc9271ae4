"""The catalogue of methods, alignments, solvers, families, formats and presets: parameters, defaults, references."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..align.options import ALIGNMENTS
from ..checkpoint.formats.registry import formats
from ..core.errors import DeusMergeError, nearest
from ..methods.base import MergeMethod
from ..methods.registry import methods
from ..models.abilities import abilities, writers
from ..models.family import families
from ..models.view import family_of
from ..ot.registry import solvers
from ..ot.solver import OTSolver
from .presets import PRESETS


def catalog() -> dict[str, dict[str, dict[str, Any]]]:
    """All entries as JSON data.

    Returns:
        Kind -> name -> ``summary``, ``reference`` and more: ``parameters`` of methods and solvers; ``method``,
        ``insert`` and ``settings`` of presets.
    """
    return {
        "methods": {n: _with_parameters(m) for n, m in methods().items()},
        "alignments": {n: {"summary": summary, "reference": ref} for n, (summary, ref) in ALIGNMENTS.items()},
        "solvers": {n: _with_parameters(s) for n, s in solvers().items()},
        "families": {
            n: {
                "summary": f"model_type {', '.join(f.model_types)}",
                "reference": f"roles: {' '.join(dict.fromkeys(s.group for s in f.tensors))}",
                "writers": writers(f),
                **asdict(abilities(f)),
            }
            for n, f in families().items()
        },
        "formats": {
            n: {"summary": f.summary, "reference": f.reference, "exceptions": f.exceptions, "quantize_new": f.quantizes}
            for n, f in formats().items()
        },
        "presets": {
            n: {
                "summary": p.summary + ("" if p.function_preserving else " (changes the function)"),
                "reference": p.reference,
                "method": p.method,
                "insert": p.insert,
                "settings": p.parameters,
            }
            for n, p in PRESETS.items()
        },
    }


def entries_of(name: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The entries of the catalogue that have a name, which may be a model_type of a family of another name.

    Raises:
        DeusMergeError: there is none.
    """
    everything = catalog()
    if name not in everything["families"] and (family := family_of(name)):
        name = family.name
    found = {kind: {name: entries[name]} for kind, entries in everything.items() if name in entries}
    if not found:
        known = [n for entries in everything.values() for n in entries]
        raise DeusMergeError(
            f"unknown name {name!r}",
            expected="a name that deus-merge methods lists, or a model_type of a described family",
            hint=nearest(name, known, 3) or "deus-merge methods without a name lists all",
        )
    return found


def _with_parameters(entry: MergeMethod | OTSolver) -> dict[str, Any]:
    parameters = [
        {"name": p.name, "values": p.expected, "default": p.default, "scope": p.scope, "help": p.help}
        for p in entry.parameters
    ]
    return {"summary": entry.summary, "reference": entry.reference, "parameters": parameters}
