"""A finished checkpoint against its manifest, its sources and transformers. Memory does not grow with the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..checkpoint.reader import TensorSource
from ..core.errors import DeusMergeError, VerifyError, printable
from ..report.manifest import read_manifest
from .checks import CHECKS, Output, Skipped

__all__ = ["Check", "Verification", "verify"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        passed: True, False, or None when it could not be looked at.
        detail: A count, a reason, or where it failed.
        facts: What was measured, by name.
        seconds: How long it took.
    """

    name: str
    passed: bool | None
    detail: str
    facts: Mapping[str, object] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Verification:
    """All checks of one checkpoint.

    Attributes:
        folder: The output.
        checks: In the order they were made.
        strict: Whether a check that could not be made counts as failed.
        checksums: XXH3-128 of every tensor, by name; empty when the files could not be read.
    """

    folder: Path
    checks: tuple[Check, ...]
    strict: bool = False
    checksums: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(c for c in self.checks if c.passed is False or (self.strict and c.passed is None))

    @property
    def passed(self) -> bool:
        return not self.failed

    def describe(self) -> dict:
        """As JSON data."""
        checks = [{**vars(c), "facts": dict(c.facts), "seconds": round(c.seconds, 4)} for c in self.checks]
        return {"folder": str(self.folder), "passed": self.passed, "strict": self.strict, "checks": checks}


def verify(
    folder: str | Path,
    *,
    quick: bool = False,
    logits_text: str | None = None,
    strict: bool = False,
    record: Mapping | None = None,
    sources: Sequence[TensorSource] | None = None,
) -> Verification:
    """Check an output folder.

    Args:
        folder: A finished output (or one about to be renamed into place).
        quick: Leave out finite values and what needs transformers.
        logits_text: Also run base and output over this text in float32 and compare their logits.
        strict: Count a check that cannot be made as failed.
        record: The manifest of an output that has none yet: its tensors' checksums are taken, not compared.
        sources: With ``record``: the models it was made from.

    Raises:
        CheckpointError: there is no manifest, so nothing to compare with.
    """
    folder = Path(folder)
    checks: list[Check] = []

    def look(name: str, check: Callable[[], tuple]) -> None:
        began = time.monotonic()
        found = _found(check)
        checks.append(Check(name, *found, seconds=time.monotonic() - began))

    if record is None:
        try:
            record = read_manifest(folder)
            checks.append(Check("manifest", True, f"format {record['format']}"))
        except VerifyError as error:
            checks.append(Check("manifest", False, str(error)))
    output = Output(folder, record, sources, finite=not quick) if record else None
    wanted = [(name, check) for name, check, slow in CHECKS if not (quick and slow)]
    if logits_text is not None:
        wanted.append(("logits", lambda output: output.logits(logits_text)))
    for name, check in wanted:
        look(name, partial(check, output)) if output else checks.append(Check(name, None, "no manifest to go by"))
    return Verification(folder, tuple(checks), strict, output.taken if output else {})


def _found(check: Callable[[], tuple]) -> tuple:
    """What a check says, whatever a damaged output makes it do."""
    try:
        return check()
    except Skipped as reason:
        return None, str(reason)
    except DeusMergeError as error:
        return False, str(error)
    except Exception as error:  # libraries raise what they like on a damaged file: it did not pass
        return False, printable(f"{type(error).__name__}: {error}")
