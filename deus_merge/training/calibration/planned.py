"""``calibrate:`` in a recipe: the blocks of a plan are written first, then the outputs of their new layers are set in
the same unfinished folder, so that nothing has the output's name before both are complete."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ...checkpoint.output_folder import OutputFolder
from ...checkpoint.reader import Checkpoint
from ...checkpoint.shards import ShardWriter
from ...core.errors import PlanError, json_text
from ...core.tensors import StoredTensor
from ...core.typed_json import dump, parse
from ...models.tokenizer.files import is_tokenizer_file
from ...models.view import view_model
from ...plan.calibration import PlannedCalibration
from ...plan.documents import PlannedResult
from ...plan.types import Plan
from ...recipe.calibrate import read_text
from ...report.card_edits import calibrated_card
from ...report.manifest import Manifest
from ...report.manifest_parts import CalibratedLayer
from ...report.plan_manifest import manifest_of
from ...run.preflight import RunOptions
from .job import Job, OnLayer, calibrate_layers, prepare
from .options import CalibrationOptions, Windows, read_windows
from .output import calibrated_manifest
from .writers import Writers

if TYPE_CHECKING:
    from torch import Tensor

_CARD = "README.md"
_LAYER = "layer "  # of the journal's name for a layer whose outputs are set


@dataclass(frozen=True)
class PlannedCalibrator:
    """A calibration of a plan's output that passed every check: a `preflight.Calibrator`.

    Attributes:
        job: What to do.
        on_layer: Called after each layer, with whether an earlier run had finished it.
    """

    job: Job
    on_layer: OnLayer

    @property
    def identity(self) -> Mapping[str, object]:
        return self.job.identity

    @property
    def disk(self) -> int:
        return self.job.needs.disk

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.job.notes

    def run(self, output: OutputFolder, writer: ShardWriter, manifest: Manifest) -> Manifest:
        """Set the outputs of the new layers in the unfinished folder; see `preflight.Calibrator`."""
        target = _UnfinishedFolder(output, writer)
        target.restore_zeros(self.job.writers)
        record = self.job.record(calibrate_layers(self.job, target, self.on_layer))
        card = output.folder / _CARD
        if card.is_file():
            output.put(_CARD, calibrated_card(card.read_text(encoding="utf-8"), record).encode())
        return calibrated_manifest(manifest, record, {})


def calibrator_of(plan: Plan, options: RunOptions, on_layer: OnLayer | None = None) -> PlannedCalibrator | None:
    """Check a plan's calibration as far as it can be known before a byte is written. Reads no tensor.

    Args:
        plan: The plan.
        options: Device, threads and memory of the run.
        on_layer: Called after each layer, with whether an earlier run had finished it.

    Returns:
        What `execute` runs; None for a plan without a calibration.

    Raises:
        PlanError: the text has changed since the plan was made, too little memory, or no such device.
        TrainingError: the model cannot be run layer by layer, no output can be set, the text is too short, there is no
            tokenizer, or the text has tokens that the model has no row for.
    """
    planned = plan.calibration
    if planned is None:
        return None
    how = planned.how
    text = _unchanged_text(planned)
    run = {"device": options.device, "max_memory": options.max_memory, "threads": options.threads}
    chosen = CalibrationOptions(**how.settings, **run)
    job = planned_job(plan, text, chosen, how.at("text").where)
    return PlannedCalibrator(job, on_layer or (lambda layer, resumed: None))


def planned_job(plan: Plan, text: str, options: CalibrationOptions, where: str) -> Job:
    """What `calibrate` would do with a plan's output. Reads no tensor.

    Args:
        plan: The plan.
        text: The text.
        options: How.
        where: The text's place in messages.

    Raises:
        PlanError, TrainingError: as `calibrator_of`.
    """
    manifest = manifest_of(plan, {}, {}, {}, {"device": "", "threads": 0})
    source = _PlannedOutput(plan)
    view = view_model(source.config, tuple(source.tensors), source.where)
    read = partial(_windows, plan, text, options, where)
    return prepare(manifest, source, view, read, options, plan.new_layers)


def _unchanged_text(planned: PlannedCalibration) -> str:
    where = planned.how.at("text").where
    text = read_text(planned.how.text, where)
    if hashlib.sha256(text.encode()).hexdigest() != planned.text_sha256:
        raise PlanError("the text has changed since the plan was made", where=where, got=planned.how.text)
    return text


def _windows(plan: Plan, text: str, options: CalibrationOptions, where: str, vocabulary: int) -> Windows:
    """`read_windows` with the tokenizer that the output will have."""
    with TemporaryDirectory(prefix="deus_merge-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json_text(plan.config, indent=2), encoding="utf-8")
        for file, content in plan.files.items():
            if is_tokenizer_file(file):
                path = folder / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        return read_windows(folder, text, options, vocabulary, model="the output", where=where)


class _PlannedOutput(PlannedResult):
    """The output of a plan as a `TensorSource`, none of whose tensors can be read yet."""

    @property
    def where(self) -> str:
        return "the output"

    def _info(self, name: str) -> StoredTensor:
        return replace(super()._info(name), quantization=self.planned(name)[1].quantization)


class _UnfinishedFolder:
    """The folder of a run whose blocks are complete: a `job.Target`.

    The journal has a line for each layer whose outputs are on the disk. Those of the next layer may hold parts of what
    an interrupted run wrote.

    Args:
        output: The folder.
        writer: Its tensors.
    """

    def __init__(self, output: OutputFolder, writer: ShardWriter):
        self._output, self._writer = output, writer
        self.scratch = output.area.staging / "hidden"
        lines = (diagnostics for block, diagnostics in output.finished.items() if block.startswith(_LAYER))
        self.finished = tuple(parse(CalibratedLayer, line) for line in lines)

    def restore_zeros(self, writers: Writers) -> None:
        """Write zeros where an interrupted run may have written a layer that it did not finish."""
        for names in list(writers.layers.values())[len(self.finished) :][:1]:
            for writer in names:
                self._writer.zeros(writer.tensor)

    def written(self) -> Checkpoint:
        return Checkpoint.open(self._output.folder)

    unfinished = written  # finished and unfinished layers are in one folder

    def write_layer(self, layer: CalibratedLayer, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._writer.write_tensor(name, value)
        self._output.record(f"{_LAYER}{layer.layer}", dump(layer))
        self._output.flush()
