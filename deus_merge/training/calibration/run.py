"""Sets the zeroed outputs of new layers in closed form, and writes the model with them to a new folder.

From the lowest new layer to the highest: one forward and one backward pass over the fitted windows give the statistics
(`fit`), the weights follow from them, and the windows that are held out choose the step size. A layer whose best step
does not lower their loss stays zero, so that loss never rises.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...checkpoint.dequantized import dequantized
from ...checkpoint.reader import Checkpoint
from ...core.errors import DeusMergeError, TrainingError
from ...models.built import CannotBuild
from ...models.streamed import CannotStream
from ...models.view import ModelView
from ...report.manifest import Manifest, check_belongs
from ...report.manifest_parts import CalibratedLayer, Calibration
from ...run.device import choose_device, machine_identity, set_threads
from ..freeze import read_training
from .layer_runner import LayerRunner
from .memory import Needs, check_memory, estimate
from .options import CalibrationOptions, Windows, read_windows
from .output import CalibratedOutput
from .passes import Passes
from .steps import calibrate_layer
from .writers import Writers, check_untrained, find_writers

if TYPE_CHECKING:
    import torch

OnLayer = Callable[[CalibratedLayer, bool], None]


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

    def describe(self) -> dict:
        """As JSON data."""
        layers = [{**vars(layer), "tensors": list(layer.tensors)} for layer in self.record.layers]
        facts = {**vars(self.record), "layers": layers}
        return {"folder": str(self.folder), **facts, "notes": list(self.notes), "seconds": round(self.seconds, 3)}


def calibrate(
    folder: Path | str,
    out: Path | str,
    text: str,
    options: CalibrationOptions | None = None,
    on_layer: OnLayer | None = None,
) -> Calibrated:
    """Set the zeroed outputs of an output's new layers from a text. Everything else is copied.

    Args:
        folder: An output whose new layers have zeroed outputs and were not trained.
        out: The new folder; it appears when it is complete and checked.
        text: The text. Its tokens count as training tokens wherever results are compared.
        options: Tokens, method, damping, device ...
        on_layer: Called after each new layer, with whether an earlier run had finished it.

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
        job = _prepared(manifest, checkpoint, view, text, options)
        output = CalibratedOutput(
            Path(out), manifest, checkpoint, job.identity, resume=options.resume, overwrite=options.overwrite
        )
        notes = (*job.writers.notes, *job.notes)
        if found := output.earlier(job.record(())):
            return Calibrated(Path(out), found, (*notes, "the output was complete already"), time.monotonic() - began)
        output.check(job.needs)
        with _resume_hints(output), output:
            record = job.record(_run(job, output, on_layer or (lambda layer, resumed: None)))
            notes += output.finish(record)
    return Calibrated(Path(out), record, notes, time.monotonic() - began)


@dataclass(frozen=True)
class _Job:
    """A calibration that passed every check."""

    checkpoint: Checkpoint
    view: ModelView
    new_layers: tuple[int, ...]
    runner: LayerRunner
    windows: Windows
    writers: Writers
    options: CalibrationOptions
    device: torch.device
    threads: int
    needs: Needs
    notes: tuple[str, ...]

    @property
    def identity(self) -> dict[str, object]:
        """What decides the result besides the model."""
        run = {"device": self.device.type, "threads": self.threads, **machine_identity(self.device)}
        return {**self.options.identity, **run, "text": self.windows.text_sha256}

    def record(self, layers: Sequence[CalibratedLayer]) -> Calibration:
        """The manifest's record; without losses where no layer is given."""
        windows, options = self.windows, self.options
        return Calibration(
            method=options.method,
            text_sha256=windows.text_sha256,
            tokens=windows.fitted * windows.length,
            held_out_tokens=windows.held_out * windows.length,
            length=windows.length,
            damping=options.damping,
            seed=options.seed,
            loss_before=layers[0].loss_before if layers else 0.0,
            loss_after=layers[-1].loss_after if layers else 0.0,
            layers=tuple(layers),
        )


def _prepared(
    manifest: Manifest, checkpoint: Checkpoint, view: ModelView, text: str, options: CalibrationOptions
) -> _Job:
    """Check all that can be known to go wrong, before anything is written.

    Raises:
        PlanError, TrainingError: as `calibrate`.
    """
    new = check_untrained(manifest, checkpoint)
    device = choose_device(options.device)
    threads = set_threads(options.threads)
    source = dequantized(checkpoint)
    try:
        runner = LayerRunner(source, view, device)
    except (CannotBuild, CannotStream) as error:
        raise _refusal(view, checkpoint, str(error)) from None
    writers = find_writers(manifest, view, source, runner)
    windows = read_windows(checkpoint.folder, text, options, runner.vocabulary)
    columns = max(sum(writer.columns for writer in found) for found in writers.layers.values())
    shape = (windows.fitted, windows.held_out)
    needs = estimate(view, source.tensors, checkpoint.config, options, columns, shape, in_place=device.type == "cpu")
    check_memory(needs, options.max_memory, str(device))
    notes = []
    tokens, fitted = windows.ids.numel(), windows.fitted * windows.length
    if tokens <= options.tokens - options.length:
        notes.append(f"the text has only {tokens} tokens in whole windows")
    if fitted < columns:
        notes.append(f"{fitted} fitted tokens for {columns} inputs: more tokens, or more damping, fit better")
    return _Job(checkpoint, view, new, runner, windows, writers, options, device, threads, needs, tuple(notes))


def _refusal(view: ModelView, checkpoint: Checkpoint, reason: str) -> TrainingError:
    return TrainingError(
        f"models of {view.model_type!r} cannot be calibrated: they cannot be run one layer at a time",
        where=checkpoint.folder,
        got=reason,
    )


def _run(job: _Job, output: CalibratedOutput, on_layer: OnLayer) -> list[CalibratedLayer]:
    """Calibrate the layers that an earlier run has not finished."""
    done = output.finished
    new = list(job.writers.layers)
    try:
        if done:  # the layers of the earlier run are in the new folder
            job.runner.read_from(dequantized(output.written()))
        passes = Passes(job.runner, job.windows, output.scratch, job.options.batch, job.device)
    except CannotStream as error:
        raise _refusal(job.view, job.checkpoint, str(error)) from None
    # new layers are the identity until their step is kept
    passes.skipped |= set(job.new_layers) - {layer.layer for layer in done if layer.alpha}
    for layer in done:
        on_layer(layer, True)
    found = list(done)
    if done:
        passes.advance(done[-1].layer + 1)
        job.runner.read_from(dequantized(job.checkpoint))
    for index in new[len(done) :]:
        passes.advance(index)
        before = found[-1].loss_after if found else None
        step = calibrate_layer(passes, job.writers.layers[index], before, job.options)
        output.write_layer(step.layer, step.weights)
        if step.weights:
            passes.skipped.discard(index)
            with job.runner.layers[index].held():
                step.set_weights()
                passes.run_here()
        passes.position = index + 1
        found.append(step.layer)
        on_layer(step.layer, False)
    passes.close()
    return found


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
