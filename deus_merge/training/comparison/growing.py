"""The checkpoints that a comparison trains: grown, and calibrated. Each is made when first needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...core.errors import CheckpointError
from ...plan.types import Plan
from ...report.manifest import read_manifest
from ...run.executor import execute
from ...run.preflight import RunOptions
from ..calibration import CalibrationOptions, calibrate
from ..calibration.planned import planned_job
from .candidates import Candidate, Fixed, insert_text
from .options import CompareOptions
from .text import split


def check_calibrations(
    plans: Mapping[Candidate, Plan], text: Sequence[Path], options: CompareOptions, device: str
) -> None:
    """Check calibrated candidates before a byte is written.

    Raises:
        PlanError, TrainingError: an output cannot be calibrated, or not with the text.
    """
    calibrated = [plan for candidate, plan in plans.items() if candidate.calibrated]
    if calibrated:
        settings = CalibrationOptions(tokens=options.tokens_of_calibration, length=options.length, device=device)
        content = "".join(split(text).training)
        for plan in {plan.hash: plan for plan in calibrated}.values():
            planned_job(plan, content, settings, "--text")


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
            folder = self._calibrated(candidate, folder)
        return Grown(folder, read_manifest(folder).new_layers)

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
