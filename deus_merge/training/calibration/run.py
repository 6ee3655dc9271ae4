"""Sets the zeroed outputs of new layers in closed form, and writes the model with them to a new folder.

From the lowest new layer to the highest: one forward and one backward pass over the fitted windows give the statistics
(`fit`), the weights follow from them, and the windows that are held out choose the step size. A layer whose best step
does not lower their loss stays zero, so that loss never rises.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...checkpoint.dequantized import dequantized
from ...checkpoint.reader import Checkpoint
from ...core.errors import DeusMergeError
from ...core.text import plural
from ...report.manifest import check_belongs
from ...report.manifest_parts import Calibration
from ...run.device import threads_kept
from ..freeze import read_training
from .job import OnLayer, calibrate_layers, prepare
from .options import CalibrationOptions, read_windows
from .output import CalibratedOutput
from .writers import check_untrained


@dataclass(frozen=True)
class Calibrated:
    """A finished calibration.

    Attributes:
        folder: The folder that was written.
        record: What the manifest says about it.
        notes: What stays zero and why, and what else is worth knowing.
        seconds: Wall time.
    """

    folder: Path
    record: Calibration
    notes: tuple[str, ...]
    seconds: float

    def __repr__(self) -> str:
        found = self.record
        change = f"loss {found.loss_before:.4f} -> {found.loss_after:.4f} on {found.held_out_tokens} held-out tokens"
        return f"Calibrated({self.folder}: {change}; {plural(len(found.layers), 'layer')})"

    def describe(self) -> dict:
        """As JSON data."""
        layers = [{**vars(layer), "tensors": list(layer.tensors)} for layer in self.record.layers]
        facts = {**vars(self.record), "layers": layers}
        return {"folder": str(self.folder), **facts, "notes": list(self.notes), "seconds": round(self.seconds, 3)}


@threads_kept()
def calibrate(
    folder: Path | str,
    out: Path | str,
    text: str,
    options: CalibrationOptions | None = None,
    on_layer: OnLayer | None = None,
    on_start: Callable[[int], None] | None = None,
) -> Calibrated:
    """Set the zeroed outputs of an output's new layers from a text. Everything else is copied.

    Args:
        folder: An output whose new layers have zeroed outputs and were not trained.
        out: The new folder; it appears when it is complete and checked.
        text: The text. Its tokens count as training tokens wherever results are compared.
        options: Tokens, method, damping, device ...
        on_layer: Called after each new layer, with whether an earlier run had finished it.
        on_start: Called once before them, with their number.

    Returns:
        The losses before and after, and each layer's step.

    Raises:
        CheckpointError, VerifyError: there is no manifest, or ``folder`` is not as it was written.
        TrainingError: the layers were trained, the model cannot be run layer by layer, the text is too short, or the
            statistics are not finite.
        PlanError: ``out`` is in the way, too little memory or disk, an option out of range.
    """
    began = time.monotonic()
    folder, options = Path(folder), options or CalibrationOptions()
    options.check()
    manifest = read_training(folder)
    with Checkpoint.open(folder) as checkpoint:
        view = check_belongs(manifest, checkpoint, hint="name the folder of the manifest")
        windows = partial(read_windows, checkpoint.folder, text, options)
        new = check_untrained(manifest, checkpoint)
        job = prepare(manifest, dequantized(checkpoint), view, windows, options, new)
        output = CalibratedOutput(
            Path(out), manifest, checkpoint, job.identity, resume=options.resume, overwrite=options.overwrite
        )
        notes = job.notes
        if found := output.earlier(job.record(())):
            return Calibrated(Path(out), found, (*notes, "the output was complete already"), time.monotonic() - began)
        output.check(job.needs)
        if on_start is not None:
            on_start(len(job.writers.layers))
        with _resume_hints(output), output:
            record = job.record(calibrate_layers(job, output, on_layer or (lambda layer, resumed: None)))
            notes += output.finish(record)
    return Calibrated(Path(out), record, notes, time.monotonic() - began)


@contextmanager
def _resume_hints(output: CalibratedOutput) -> Iterator[None]:
    """Whatever stops the run, say what has been saved and how to continue."""
    try:
        yield
    except BaseException as error:
        if hint := output.hint:
            if isinstance(error, DeusMergeError):
                error.hint = f"{error.hint}; {hint}" if error.hint else hint
            else:
                notes = [*getattr(error, "__notes__", ()), hint]  # BaseException.add_note came with Python 3.11
                setattr(error, "__notes__", notes)  # noqa: B010
        raise
