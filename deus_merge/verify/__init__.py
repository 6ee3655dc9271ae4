"""Checks a finished output against its manifest, its sources and transformers, in memory that does not grow with it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..checkpoint.reader import TensorSource
from ..core.errors import DeusMergeError, PlanError, VerifyError, nearest, printable
from ..core.tables import html_titled
from ..core.text import plural, some_of
from ..core.urls import is_url, place_name, public_url
from ..report.manifest import Manifest, read_manifest
from ..report.manifest_parts import ManifestSource
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

    def __repr__(self) -> str:
        return f"Verification({self._title})"

    def _repr_html_(self) -> str:
        words = {True: "ok", False: "FAILED", None: "skipped"}
        rows = [[check.name, words[check.passed], check.detail] for check in self.checks]
        return html_titled(self._title, ["check", "result", "detail"], rows)

    @property
    def _title(self) -> str:
        """The result in one line."""
        failed, count = self.failed, sum(c.passed is True for c in self.checks)
        skipped = sum(c.passed is None for c in self.checks)
        result = f"FAILED {some_of(c.name for c in failed)}; " if failed else ""
        return f"{place_name(self.folder)}: {result}{plural(count, 'check')} passed" + (
            f", {skipped} skipped" if skipped else ""
        )

    def describe(self) -> dict:
        """As JSON data."""
        checks = [{**vars(c), "facts": dict(c.facts), "seconds": round(c.seconds, 4)} for c in self.checks]
        return {"folder": place_name(self.folder), "passed": self.passed, "strict": self.strict, "checks": checks}


def verify(
    folder: str | Path,
    *,
    quick: bool = False,
    logits_text: str | None = None,
    strict: bool = False,
    places: Mapping[str, str | Path] | None = None,
    manifest: Manifest | None = None,
    sources: Sequence[TensorSource] | None = None,
    received: Mapping[str, str] | None = None,
    on_check: Callable[[Check, int], None] | None = None,
    on_begin: Callable[[str], None] | None = None,
) -> Verification:
    """Check an output folder.

    Args:
        folder: A finished output (or one about to be renamed into place).
        quick: Leave out finite values and the checks that need transformers.
        logits_text: Also run base and output over this text in float32 and compare their logits.
        strict: Count a skipped check as failed.
        places: Folders, or addresses like ``s3://bucket/model``, of sources that the manifest does not name, or that
            have moved, by the ``model`` of the source.
        manifest: The manifest of an output that has none yet: the checksums of its tensors are computed, not compared.
        sources: With ``manifest``: the models it was made from.
        received: With ``sources``: XXH3-128, in hex, of the bytes that were copied from other machines, by the name of
            the tensor. They are not read from there again.
        on_check: Called after each check, with the number of all checks.
        on_begin: Called with the name of each check before it runs.

    Returns:
        The results of all checks.

    Raises:
        CheckpointError: there is no manifest, so nothing to compare with.
        PlanError: ``places`` names a model that is no source, or a place where that source is not.
    """
    folder = Path(folder)
    checks: list[Check] = []
    wanted = [(name, check) for name, check, slow in CHECKS if not (quick and slow)]
    if logits_text is not None:
        wanted.append(("logits", lambda output, /: output.logits(logits_text)))
    total = len(wanted) + (manifest is None)

    def finished(check: Check) -> None:
        checks.append(check)
        if on_check is not None:
            on_check(check, total)

    if manifest is None:
        try:
            manifest = read_manifest(folder)
            finished(Check("manifest", True, f"format {manifest.format}"))
        except VerifyError as error:
            finished(Check("manifest", False, str(error)))
    if manifest and places:
        manifest = _placed(manifest, places)
    output = Output(folder, manifest, sources, received or {}, quick=quick, named=places or ()) if manifest else None
    for name, check in wanted:
        if on_begin is not None:
            on_begin(name)
        began = time.monotonic()
        result = _run(check, output) if output else (None, "no manifest to compare with")
        facts = result[2] if len(result) == 3 else {}
        finished(Check(name, result[0], result[1], facts, time.monotonic() - began))
    return Verification(folder, tuple(checks), strict, output.computed if output else {})


def _placed(manifest: Manifest, places: Mapping[str, str | Path]) -> Manifest:
    """The manifest with other folders of sources.

    Raises:
        PlanError: one is no source.
    """
    names = [source.model for source in manifest.sources if source.folder is not None or source.url is not None]
    for name in places:
        if name not in names:
            raise PlanError(
                "the output has no such source",
                where=f"source {name}",
                expected=" | ".join(names) or "nothing: no source has files of its own",
                got=name,
                hint=nearest(name, names),
            )

    def placed(source: ManifestSource) -> ManifestSource:
        place = places.get(source.model)
        if place is None:
            return source
        if isinstance(place, str) and is_url(place):
            same = source.url is not None and source.url == public_url(place)
            etags = source.etags if same else None  # elsewhere the same file has another one
            return replace(source, folder=None, url=place, revision=None, etags=etags)
        return replace(source, folder=os.path.abspath(place))

    return replace(manifest, sources=tuple(map(placed, manifest.sources)))


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
