"""A calibration that passed every check, and its way from the lowest new layer to the highest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ...checkpoint.dequantized import dequantized
from ...checkpoint.reader import Checkpoint
from ...checkpoint.tensor_source import TensorSource
from ...core.errors import TrainingError
from ...core.text import plural
from ...models.built import CannotBuild
from ...models.streamed import CannotStream
from ...models.view import ModelView
from ...report.manifest import Manifest
from ...report.manifest_parts import CalibratedLayer, Calibration
from ...run.device import choose_device, machine_identity, set_threads
from .layer_runner import LayerRunner
from .memory import Needs, check_memory, estimate
from .options import CalibrationOptions, Windows
from .passes import Passes
from .steps import calibrate_layer
from .writers import Writers, find_writers

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OnLayer = Callable[[CalibratedLayer, bool], None]


class Target(Protocol):
    """A folder that gets the layers that a calibration sets, one after the other.

    Attributes:
        scratch: A folder for hidden states.
        finished: The layers that an earlier run finished, in their order.
    """

    @property
    def scratch(self) -> Path: ...
    @property
    def finished(self) -> tuple[CalibratedLayer, ...]: ...

    def written(self) -> Checkpoint:
        """The model with all finished layers; only where there is one."""
        ...

    def unfinished(self) -> Checkpoint:
        """The model with the layers that are not finished yet."""
        ...

    def write_layer(self, layer: CalibratedLayer, values: Mapping[str, Tensor]) -> None:
        """Write a layer, and bring it to the disk.

        Args:
            layer: Its record.
            values: Its new values by tensor name.
        """
        ...


@dataclass(frozen=True)
class Job:
    """A calibration that passed every check.

    Attributes:
        where: The model in messages.
        view: The model by layer and role.
        new_layers: Its new layers.
        runner: It runs the model's layers.
        windows: The text.
        writers: The outputs that are set.
        options: Method, damping, batch.
        device: Where the arithmetic is done.
        threads: CPU threads.
        needs: Memory and disk.
        notes: Messages for the user.
    """

    where: object
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
        return {**self.options.settings, **run, "text": self.windows.text_sha256}

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


def prepare(
    manifest: Manifest,
    source: TensorSource,
    view: ModelView,
    read: Callable[[int], Windows],
    options: CalibrationOptions,
    new_layers: tuple[int, ...],
) -> Job:
    """Check all that can be known to go wrong, before anything is written. Reads no tensor.

    Args:
        manifest: Of the model, whose new layers are as they were made.
        source: The model, as one in floating point.
        view: The model by layer and role.
        read: Reads the text, given the number of tokens that the model has rows for.
        options: Method, device, memory ...
        new_layers: The new layers.

    Raises:
        PlanError: too little memory, or no such device.
        TrainingError: the model cannot be run layer by layer, no output can be set, the text is too short.
    """
    device = choose_device(options.device)
    threads = set_threads(options.threads)
    try:
        runner = LayerRunner(source, view, device)
    except (CannotBuild, CannotStream) as error:
        raise refusal(view, source.where, str(error)) from None
    writers = find_writers(manifest, view, source, runner)
    windows = read(runner.vocabulary)
    columns = max(sum(writer.columns for writer in found) for found in writers.layers.values())
    shape = (windows.fitted, windows.held_out)
    needs = estimate(view, source.tensors, source.config, options, columns, shape)
    check_memory(needs, options.max_memory, str(device))
    notes = list(writers.notes)
    tokens, fitted = windows.ids.numel(), windows.fitted * windows.length
    if tokens <= options.tokens - options.length:
        notes.append(f"the text has only {plural(tokens, 'token')} in whole windows")
    if fitted < columns:
        notes.append(f"{fitted} fitted tokens for {columns} inputs: more tokens, or more damping, fit better")
    return Job(source.where, view, new_layers, runner, windows, writers, options, device, threads, needs, tuple(notes))


def calibrate_layers(job: Job, target: Target, on_layer: OnLayer) -> list[CalibratedLayer]:
    """Calibrate the layers that an earlier run has not finished.

    Args:
        job: What to do.
        target: Where the layers are written.
        on_layer: Called after each layer, with whether an earlier run had finished it.

    Returns:
        The record of each layer.

    Raises:
        TrainingError: the model cannot be run layer by layer, or the statistics are not finite.
    """
    done = target.finished
    new = list(job.writers.layers)
    runner = job.runner
    try:
        runner.read_from(dequantized(target.written() if done else target.unfinished()))
        passes = Passes(runner, job.windows, target.scratch, job.options.batch, job.device)
    except CannotStream as error:
        raise refusal(job.view, job.where, str(error)) from None
    # new layers are the identity until their step is kept
    passes.skipped |= set(job.new_layers) - {layer.layer for layer in done if layer.alpha}
    for layer in done:
        on_layer(layer, True)
    found = list(done)
    if done:
        passes.advance(done[-1].layer + 1)
        runner.read_from(dequantized(target.unfinished()))
    for index in new[len(done) :]:
        passes.advance(index)
        before = found[-1].loss_after if found else None
        step = calibrate_layer(passes, job.writers.layers[index], before, job.options)
        target.write_layer(step.layer, step.weights)
        runner.read_from(dequantized(target.unfinished()))  # its files may have changed
        if step.weights:
            passes.skipped.discard(index)
            with runner.layers[index].held():
                step.set_weights()
                passes.run_here()
        passes.position = index + 1
        found.append(step.layer)
        on_layer(step.layer, False)
    passes.close()
    return found


def refusal(view: ModelView, where: object, reason: str) -> TrainingError:
    """The error about a model that cannot be run layer by layer."""
    return TrainingError(
        f"models of {view.model_type!r} cannot be calibrated: they cannot be run one layer at a time",
        where=where,
        got=reason,
    )
