"""Copies a manifest to the model that a trainer saved."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

from ..checkpoint.adapter import CONFIG as ADAPTER
from ..checkpoint.reader import Checkpoint
from ..core.errors import CheckpointError, TrainingError, VerifyError
from ..report.manifest import MANIFEST, RECIPE, check_belongs, read_manifest


def carry_manifest(source: Path | str, target: Path | str, *, replace: bool = False, all_layers: bool = False) -> None:
    """Copy a manifest to a folder that a trainer saved: the trained model can then be stripped, verified, and grown
    again with its lineage.

    Args:
        source: The folder that was trained, or its manifest.
        target: The folder of the trained model. The manifest there says that it was trained.
        replace: Whether to overwrite the manifest of another model, which was in the folder before.
        all_layers: Whether the base was trained, too: `verify` then does not compare it with the one that was grown.

    Raises:
        CheckpointError, ArchitectureError: there is no manifest in the source, or no model in the target.
        TrainingError: the target holds another model: of other layers, an adapter, or with a manifest of its own.
    """
    carry(Path(source), Path(target), replace=replace, all_layers=all_layers)


def carry(
    source: Path, target: Path, *, replace: bool = False, all_layers: bool = False, home: Path | None = None
) -> None:
    """`carry_manifest` to a folder that gets its name later.

    Args:
        source, target, replace, all_layers: As of `carry_manifest`.
        home: The folder's name once it is finished: the manifest names its sources from there.
    """
    manifest = read_manifest(source)
    manifest = dataclasses.replace(manifest, trained=True, base_trained=manifest.base_trained or all_layers)
    if not (target / "config.json").is_file():
        if (target / ADAPTER).is_file():
            raise TrainingError(
                "an adapter, not the model",
                where=target,
                expected="the trained model as a whole",
                hint="merge it into the model (peft: model.merge_and_unload()), and save that",
            )
        hint = "save the trained model first: trainer.save_model(folder) or model.save_pretrained(folder)"
        raise CheckpointError("no model to copy a manifest to", where=target, hint=hint)
    check_belongs(manifest, Checkpoint.open(target), hint="name the folder that was trained, and where it was saved")
    file, another = target / MANIFEST, False
    if file.is_file() and not replace:
        with contextlib.suppress(VerifyError):  # a damaged one may be replaced
            another = read_manifest(file).plan_hash != manifest.plan_hash
    if another:
        hint = "if the model there has been replaced since: replace=True"
        raise TrainingError("the folder has the manifest of another model", where=file, hint=hint)
    recipe = (source.parent if source.is_file() else source) / RECIPE
    if recipe.is_file():
        _write(target / RECIPE, recipe.read_bytes())
    _write(file, manifest.sealed(home or target))


def _write(path: Path, content: bytes) -> None:
    """Replace a file in one step: when the model was trained in place, it may be the only copy."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
