"""Optimizers for new layers: AdamW with a rate of its own for what began as zeros, and Muon on matrices."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import TrainingError, nearest
from ..report.manifest import Manifest
from .freeze import optimizer_groups, read_training
from .names import parameters_of

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import Optimizer

KINDS = ("adamw", "muon")
_LOGGED = "matrices"  # trainers log the rate of the first group: that is to be ``lr``


def optimizer(
    model: Module,
    path: Path | str,
    *,
    lr: float,
    kind: str = "adamw",
    output_ratio: float = 1.0,
    zeroed_lr: float | None = None,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.95,
) -> Optimizer:
    """An optimizer of everything that trains, for any loop, scheduler or trainer.

    What began as zeros (``o``, ``down`` and their biases) has a learning rate of its own: until it has grown, the rest
    of a layer does not learn. Schedulers scale every group's rate, so the ratio stays.

    With ``kind="muon"`` the matrices of new layers are updated by Muon: experts one by one, the matrices of a fused
    tensor (q, k and v; gate and up) one by one where the family is described, else as one. AdamW updates norms,
    biases, embeddings, convolutions and all that peft added. Muon's updates are scaled to the size of AdamW's, so that
    one ``lr`` is right for both. It needs whole matrices: one process or DistributedDataParallel, not FSDP or ZeRO.

    Args:
        model: As `freeze_base` left it.
        path: The output folder, or its manifest.
        lr: The learning rate; `find_lr` suggests one.
        kind: ``adamw`` or ``muon``.
        output_ratio: The learning rate of what began as zeros, in units of ``lr``. 1 to 4 are worth a try; see LoRA+.
            Where nothing is zero, as after a calibration, it has no effect, and a warning says so.
        zeroed_lr: That learning rate itself, in place of ``output_ratio``: as for `optimizer_groups`.
        weight_decay: The weight decay of matrices, decoupled; norms and biases have none.
        betas, eps: Of AdamW.
        momentum: Of Muon.

    Returns:
        A `torch.optim.AdamW`, or a `muon.MuonAdamW`. Its groups have names: ``matrices``, ``zeroed``, ``vectors``,
        ``zeroed vectors``, ``added``; with Muon also those of matrices that it leaves to AdamW.

    Raises:
        CheckpointError, TrainingError: as `optimizer_groups`; a value is out of range; or this torch has no Muon.

    Reference:
        Hayou et al., LoRA+: efficient low rank adaptation of large models, arXiv 2402.12354 (a higher rate for the
        factor that begins as zeros).
    """
    check_kind(kind)
    check_rates(lr=lr, output_ratio=output_ratio, zeroed_lr=zeroed_lr)
    if zeroed_lr is not None and output_ratio != 1.0:
        raise TrainingError(
            "two rates for what began as zeros",
            expected="output_ratio or zeroed_lr",
            got=f"output_ratio={output_ratio}, zeroed_lr={zeroed_lr}",
        )
    import torch

    groups = optimizer_groups(
        model, path, lr=lr, zeroed_lr=lr * output_ratio if zeroed_lr is None else zeroed_lr, weight_decay=weight_decay
    )
    if output_ratio != 1.0 and not any(group["name"].startswith("zeroed") for group in groups):
        warnings.warn(without_zeros(read_training(path), output_ratio), stacklevel=2)
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
    if kind == "adamw":
        return torch.optim.AdamW(_ordered(groups), weight_decay=weight_decay, **settings)
    from .matrices import splits
    from .muon import MuonAdamW

    manifest = read_training(path)
    matrices = splits(model, manifest, parameters_of(model, manifest))
    parted = []
    for group in groups:
        by_muon = [p for p in group["params"] if p in matrices]
        rest = [p for p in group["params"] if p not in matrices]
        if by_muon:
            parted.append(group | {"params": by_muon, "algorithm": "muon"})
        if rest:
            name = f"{group['name']} by AdamW" if by_muon else group["name"]
            parted.append(group | {"params": rest, "algorithm": "adamw", "name": name})
    return MuonAdamW(_ordered(parted), matrices, momentum=momentum, **settings)


def without_zeros(manifest: Manifest, output_ratio: float) -> str:
    """What to say of a ratio for an output where nothing that trains is zero."""
    why = "calibration has set what began as zeros" if manifest.calibration else "nothing that trains began as zeros"
    return f"output_ratio {output_ratio:g} has no effect, everything trains at lr: {why}"


def check_kind(kind: str) -> str:
    """The name of an optimizer, checked.

    Raises:
        TrainingError: there is no such optimizer.
    """
    if kind not in KINDS:
        raise TrainingError("unknown optimizer", expected=" | ".join(KINDS), got=kind, hint=nearest(kind, KINDS))
    return kind


def check_rates(**values: float | None) -> None:
    """Check that rates are positive.

    Raises:
        TrainingError: one is not.
    """
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise TrainingError("not a rate", where=name, expected="a positive number", got=value)


def _ordered(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(groups, key=lambda group: group["name"] != _LOGGED)
