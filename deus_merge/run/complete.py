"""Whether a finished output is what a run would make."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from .. import __version__
from ..checkpoint.storage import open_sink
from ..core.errors import DeusMergeError
from ..core.urls import address_of
from ..plan.types import Plan
from ..report.manifest import MANIFEST, read_manifest
from ..report.plan_manifest import plan_sources, planned_source


def is_complete(plan: Plan, out: Path, run_record: Mapping[str, object] | None) -> bool:
    """Whether a finished output is what a run would make.

    Args:
        plan: The plan of the run.
        out: The output folder, or its address as a path.
        run_record: Its options as the manifest records them; None where they do not matter.
    """
    try:
        manifest, written = read_manifest(out), _written(out)
    except (DeusMergeError, OSError):
        return False
    same = (manifest.plan_hash, manifest.deus_merge) == (plan.hash, __version__)
    same = same and all(manifest.options.get(key) == value for key, value in (run_record or {}).items())
    # fine-tunes of one model have the same headers, so the plan's hash does not tell them apart
    planned = [planned_source(source, name) for source, name in plan_sources(plan).items()]
    recorded, wanted = (
        [(s.contents, s.document, s.url, s.revision, s.etags) for s in both] for both in (manifest.sources, planned)
    )
    untouched = (manifest.calibration is None) == (plan.calibration is None) and not manifest.trained
    return (
        same
        and untouched
        and recorded == wanted
        and all(file.modified <= written for m in plan.models for file in m.stamp)
    )


def _written(out: Path) -> int:
    """When an output's manifest was written, in nanoseconds."""
    if address := address_of(out):
        found = open_sink(address).identity(MANIFEST)
        return found.modified + 10**9 if found else 0  # a store gives whole seconds
    return os.stat(out / MANIFEST).st_mtime_ns
