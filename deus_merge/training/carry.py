"""Takes a manifest along to what a trainer has saved."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ..checkpoint.adapter import CONFIG as ADAPTER
from ..checkpoint.reader import Checkpoint
from ..core.errors import CheckpointError, TrainingError, VerifyError
from ..report.manifest import MANIFEST, RECIPE, check_belongs, read_manifest, sealed


def carry_manifest(source: Path | str, target: Path | str, *, replace: bool = False) -> None:
    """Bring a manifest along to a folder that a trainer saved: the trained model can then be stripped, verified, and
    made deeper again with its lineage.

    Args:
        source: The folder that was trained, or its manifest.
        target: The folder of the trained model. Its manifest says that it was trained.
        replace: Also where the folder has the manifest of another model, which has been replaced.

    Raises:
        CheckpointError, ArchitectureError: there is no manifest in the source, or no model in the target.
        TrainingError: the target holds another model: of other layers, an adapter, or with a manifest of its own.
    """
    source, target = Path(source), Path(target)
    record = read_manifest(source) | {"trained": True}
    if not (target / "config.json").is_file():
        if (target / ADAPTER).is_file():
            raise TrainingError(
                "an adapter, not the model",
                where=target,
                expected="the trained model as a whole",
                hint="merge it into the model (peft: model.merge_and_unload()), and save that",
            )
        hint = "save the trained model first: trainer.save_model(folder) or model.save_pretrained(folder)"
        raise CheckpointError("no model to carry a manifest to", where=target, hint=hint)
    check_belongs(record, Checkpoint.open(target), hint="name the folder that was trained, and where it was saved")
    there, another = target / MANIFEST, False
    if there.is_file() and not replace:
        with contextlib.suppress(VerifyError):  # a damaged one says nothing
            another = read_manifest(there)["plan_hash"] != record["plan_hash"]
    if another:
        hint = "if the model there has been replaced since: replace=True"
        raise TrainingError("the folder has the manifest of another model", where=there, hint=hint)
    recipe = (source.parent if source.is_file() else source) / RECIPE
    if recipe.is_file():
        _put(target / RECIPE, recipe.read_bytes())
    _put(there, sealed(record))


def _put(path: Path, content: bytes) -> None:
    """At once: when training was in place, the file that is replaced is the only one."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_bytes(content)
    os.replace(beside, path)
