"""The results of calls that have none of their own: short in a terminal, tables in a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.tables import html_titled
from ..core.text import plural
from ..core.typed_json import dump
from ..core.units import format_count, format_seconds, format_size
from ..plan.types import Plan
from ..report.manifest_parts import BlockSeconds, Calibration
from ..verify import Verification


@dataclass(frozen=True)
class MergeResult:
    """A finished run.

    Attributes:
        folder: The output folder.
        plan: The plan that was run.
        verification: The verification's result; None when it was switched off.
        warnings: Warnings of the plan and of the run (transport plans that did not converge).
        seconds: Wall time.
        calibration: The record of the calibration; None where the recipe has no ``calibrate``.
        times: Seconds that the blocks were read, computed, written and waited for, of all threads and processes
            together; None where the output was there already.
    """

    folder: Path
    plan: Plan = field(repr=False)
    verification: Verification | None
    warnings: tuple[str, ...]
    seconds: float
    calibration: Calibration | None = None
    times: BlockSeconds | None = None

    def __repr__(self) -> str:
        return f"MergeResult({self._title})"

    def _repr_html_(self) -> str:
        return "".join(f"<p>{html.escape(line)}</p>" for line in (self._title, *self.warnings))

    @property
    def _title(self) -> str:
        """The result in one line."""
        passed = sum(check.passed is True for check in self.verification.checks) if self.verification else 0
        checked = f"{plural(passed, 'check')} passed" if self.verification else "not verified"
        layers = f"{self.plan.donor.view.num_layers} -> {plural(self.plan.num_layers, 'layer')}"
        return f"{self.folder}: {layers}, {len(self.plan.new_layers)} new; {checked}; {format_seconds(self.seconds)}"

    def describe(self) -> dict[str, Any]:
        """The result as JSON data."""
        return {
            "folder": str(self.folder),
            "plan_hash": self.plan.hash,
            "num_layers": self.plan.num_layers,
            "new_layers": list(self.plan.new_layers),
            "function_preserving": self.plan.function_preserving and not self._is_set,
            "bytes_written": self.plan.bytes_written,
            "seconds": round(self.seconds, 3),
            "times": self.times and dict(self.times),
            "verification": self.verification and self.verification.describe(),
            "warnings": list(self.warnings),
            **({"calibration": dump(self.calibration)} if self.calibration else {}),
        }

    @property
    def _is_set(self) -> bool:
        """Whether a calibration has set outputs of new layers."""
        return self.calibration is not None and any(layer.tensors for layer in self.calibration.layers)


@dataclass(frozen=True, repr=False)
class Inspection(Mapping[str, Any]):
    """Facts about a model by name: ``family``, ``layers``, ``parameters``, ``training_memory`` ...

    Attributes:
        facts: JSON data, as ``deus-merge inspect --json`` prints it.
    """

    facts: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.facts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.facts)

    def __len__(self) -> int:
        return len(self.facts)

    def __repr__(self) -> str:
        return f"Inspection({self._title})"

    def _repr_html_(self) -> str:
        rows = [[k.replace("_", " "), str(v)] for k, v in self.facts.items() if isinstance(v, str | int | float)]
        return html_titled(self._title, ["", ""], rows)

    @property
    def _title(self) -> str:
        """The model in one line."""
        facts = self.facts
        size = f"{format_count(facts['parameters'])} parameters, {format_size(facts['bytes'])}"
        return f"{facts['model']}: {facts['family']}, {plural(facts['layers'], 'layer')}; {size}"

    def describe(self) -> dict[str, Any]:
        """The facts as JSON data."""
        return dict(self.facts)


class Catalog(dict[str, dict[str, dict[str, Any]]]):
    """Methods, alignments, solvers, families, formats and presets: kind -> name -> JSON data."""

    def __repr__(self) -> str:
        return f"Catalog({', '.join(f'{len(entries)} {kind}' for kind, entries in self.items())})"

    def _repr_html_(self) -> str:
        rows = [[kind, name, entry["summary"]] for kind, entries in self.items() for name, entry in entries.items()]
        return html_titled(repr(self), ["kind", "name", "description"], rows)
