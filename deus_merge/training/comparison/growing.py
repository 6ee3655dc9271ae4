"""The checkpoints that a comparison trains: grown, drawn at random, calibrated. Each is made when first needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...core.errors import CheckpointError
from ...plan.types import Plan
from ...report.manifest import read_manifest
from ...run.executor import execute
from ...run.preflight import RunOptions
from ..calibration import CalibrationOptions, calibrate
from ..freeze import freeze_base, new_parameters
from ..saving import save_trained
from .candidates import CALIBRATED, RANDOM, Candidate, Fixed, insert_text
from .setup import draw
from .text import split


@dataclass(frozen=True)
class Grown:
    """A candidate's checkpoint, and the layers of it that train; none where the candidate does not grow."""

    folder: Path
    new_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Checkpoints:
    """Makes checkpoints.

    Attributes:
        folder: Where they are.
        fixed: The settings of the comparison.
        text: Files and folders; calibrated outputs see the training part.
        device: Where the arithmetic is done.
        on_stage: Called before something that takes a while.
    """

    folder: Path
    fixed: Fixed
    text: Sequence[Path]
    device: str
    on_stage: Callable[[str], None]

    def grown(self, candidate: Candidate, plan: Plan) -> Grown:
        """The checkpoint of a candidate that grows."""
        folder = self.folder / plan.hash[:16]
        if not folder.exists():
            self.on_stage(f"growing {candidate.init} {insert_text(candidate.places)}")
            folder.parent.mkdir(parents=True, exist_ok=True)
            options = RunOptions(device=self.device, model_card=False, resume=True)
            try:
                execute(plan, folder, options, lambda block, resumed: None)
            except CheckpointError:  # an earlier attempt that does not fit this one
                execute(plan, folder, replace(options, resume=False, overwrite=True), lambda block, resumed: None)
        if candidate.calibrated:
            if candidate.init.removeprefix(CALIBRATED) == RANDOM:
                folder = self._drawn(folder)
            folder = self._calibrated(candidate, folder)
        return Grown(folder, read_manifest(folder).new_layers)

    def _drawn(self, folder: Path) -> Path:
        """With new matrices that are drawn at random: outputs are calibrated for what they read."""
        from transformers import AutoModelForCausalLM

        out = folder.with_name(f"{folder.name}-{RANDOM}")
        if not out.exists():
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
            freeze_base(model, folder)
            draw(model, new_parameters(folder), seed=0)
            save_trained(model, folder, out, overwrite=True)
        return out

    def _calibrated(self, candidate: Candidate, folder: Path) -> Path:
        fixed = self.fixed
        out = folder.with_name(f"{folder.name}-{fixed.text}-{fixed.calibration_tokens}")
        if not out.exists():
            self.on_stage(f"calibrating {candidate.init} {insert_text(candidate.places)}")
            settings = CalibrationOptions(
                tokens=fixed.calibration_tokens, length=fixed.length, device=self.device, resume=True
            )
            calibrate(folder, out, "".join(split(self.text).training), settings)
        return out
