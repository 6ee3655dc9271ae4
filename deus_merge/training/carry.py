"""Copies a manifest to the model that a trainer saved."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

from ..checkpoint.adapter import CONFIG as ADAPTER
from ..checkpoint.reader import Checkpoint
from ..core.errors import CheckpointError, TrainingError, VerifyError
from ..report.card_edits import trained_card
from ..report.card_metadata import CARD, split_card
from ..report.manifest import MANIFEST, RECIPES, Manifest, check_belongs, read_manifest


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
    manifest = _manifest_of(source, target)
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
    try:
        checkpoint = Checkpoint.open(target)
    except CheckpointError as error:
        error.hint = "save the whole model as safetensors: model.save_pretrained(folder), and name that folder"
        raise
    hint = f"name the folder that this training began with, not {source}; no manifest fits if layers changed since"
    check_belongs(manifest, checkpoint, hint=hint)
    file, another = target / MANIFEST, False
    if file.is_file() and not replace:
        with contextlib.suppress(VerifyError):  # a damaged one may be replaced
            another = read_manifest(file).plan_hash != manifest.plan_hash
    if another:
        hint = "if the model there has been replaced since: replace=True; else name an empty folder to the trainer"
        raise TrainingError("the folder has the manifest of another model", where=file, hint=hint)
    folder = source.parent if source.is_file() else source
    for name in RECIPES:
        if (folder / name).is_file() and not _same(folder / name, target / name):
            _write(target / name, (folder / name).read_bytes())
    if (card := _card(folder, target, manifest)) is not None:
        _write(target / CARD, card.encode())
        link = str(split_card(card)[0].get("license_link", ""))
        if Path(link).name == link and (folder / link).is_file() and not (target / link).exists():
            _write(target / link, (folder / link).read_bytes())  # the licence that the card names
    _write(file, manifest.sealed(home or target))


def _manifest_of(source: Path, target: Path) -> Manifest:
    """The manifest of the model that was trained.

    Raises:
        CheckpointError, VerifyError: there is none, or it is damaged.
    """
    try:
        return read_manifest(source)
    except CheckpointError as error:
        error.hint = (
            "the arguments are the wrong way round: first the folder that was trained, then the trained model's"
            if (target / MANIFEST).is_file() and (source / "config.json").is_file()
            else "name the folder that deus-merge wrote and the training began with, or its deus_merge.json"
        )
        raise


def _card(source: Path, target: Path, manifest: Manifest) -> str | None:
    """The card of the trained model; None where the one that is there should stay, or there is none to begin with."""
    cards = [folder / CARD for folder in (source, target)]
    first, theirs = (c.read_text("utf-8", "replace") if c.is_file() else None for c in cards)
    if first is None:
        return None
    return trained_card(first, theirs, manifest.new_layers, base_trained=manifest.base_trained)


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def _write(path: Path, content: bytes) -> None:
    """Replace a file in one step: when the model was trained in place, it may be the only copy."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
