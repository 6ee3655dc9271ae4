"""Checks a finished output against its manifest, its sources and transformers, in memory that does not grow with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.reader import TensorSource
from ..core.errors import DeusMergeError, VerifyError, printable
from ..report.manifest import Manifest, read_manifest
from .checks import CHECKS, CheckResult, Output, Skipped

__all__ = ["Check", "Verification", "verify"]


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: The name of the check.
        passed: True, False, or None when it was skipped.
        detail: A count, a reason, or where it failed.
        facts: Measured values by name.
        seconds: Wall time.
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
        checks: In the order in which they ran.
        strict: Whether a skipped check counts as failed.
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
    manifest: Manifest | None = None,
    sources: Sequence[TensorSource] | None = None,
) -> Verification:
    """Check an output folder.

    Args:
        folder: A finished output (or one about to be renamed into place).
        quick: Leave out finite values and the checks that need transformers.
        logits_text: Also run base and output over this text in float32 and compare their logits.
        strict: Count a skipped check as failed.
        manifest: The manifest of an output that has none yet: the checksums of its tensors are computed, not compared.
        sources: With ``manifest``: the models it was made from.

    Returns:
        The results of all checks.

    Raises:
        CheckpointError: there is no manifest, so nothing to compare with.
    """
    folder = Path(folder)
    checks: list[Check] = []

    if manifest is None:
        try:
            manifest = read_manifest(folder)
            checks.append(Check("manifest", True, f"format {manifest.format}"))
        except VerifyError as error:
            checks.append(Check("manifest", False, str(error)))
    output = Output(folder, manifest, sources, finite=not quick) if manifest else None
    wanted = [(name, check) for name, check, slow in CHECKS if not (quick and slow)]
    if logits_text is not None:
        wanted.append(("logits", lambda output, /: output.logits(logits_text)))
    for name, check in wanted:
        began = time.monotonic()
        result = _run(check, output) if output else (None, "no manifest to compare with")
        facts = result[2] if len(result) == 3 else {}
        checks.append(Check(name, result[0], result[1], facts, time.monotonic() - began))
    return Verification(folder, tuple(checks), strict, output.computed if output else {})


def _run(check: Callable[[Output], CheckResult], output: Output) -> CheckResult:
    """The result of a check, whatever a damaged output makes it raise."""
    try:
        return check(output)
    except Skipped as reason:
        return None, str(reason)
    except DeusMergeError as error:
        return False, str(error)
    except Exception as error:  # libraries raise errors of any type on a damaged file
        return False, printable(f"{type(error).__name__}: {error}")
