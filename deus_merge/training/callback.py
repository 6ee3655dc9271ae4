"""The callback for transformers' `Trainer` and its subclasses in trl. The only module that imports transformers."""

from __future__ import annotations

import warnings
from pathlib import Path

from transformers import Trainer, TrainerCallback

from ..core.errors import DeusMergeError, TrainingError
from ..report.manifest import MANIFEST
from .carry import carry_manifest
from .checkpointing import spare_frozen
from .freeze import UNSAVED
from .watching import Watch


class NewLayersCallback(TrainerCallback):
    """Checks that frozen weights stay frozen: at the start, at every save, at the end, and every ``check_every`` steps.

    It logs norms of the new layers and of their gradients (after clipping) with the Trainer's losses, and puts the
    manifest into every ``checkpoint-N`` folder. Where the Trainer has enabled gradient checkpointing, nothing below the
    lowest new layer is computed again. Add it with `watch`: given as ``callbacks=[...]`` it runs after
    TensorBoard's and similar callbacks, and its values reach only the console and ``trainer.state.log_history``.

    Args:
        path: The output folder, or its manifest.
        check_every: Also check after this many steps, again and again; 0 for never.
        per_layer: Also log each new layer.
        generation: As given to `freeze_base`.

    Raises (while training):
        CheckpointError, TrainingError: as `Watch`; or checkpoints would be saved without the new layers, by peft.
    """

    def __init__(self, path: Path | str, *, check_every: int = 0, per_layer: bool = False, generation: int = -1):
        self.path, self.check_every, self.per_layer, self.generation = Path(path), check_every, per_layer, generation
        self._gradients: dict = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        assert model is not None  # the Trainer always passes it
        self._watch = Watch(model, self.path, self.generation)
        spare_frozen(model)  # the Trainer has enabled checkpointing by now
        if self._watch.unsaved and args.save_strategy != "no":
            hint = "or train without checkpoints: save_strategy='no'"
            raise TrainingError(UNSAVED.format(list(self._watch.unsaved)), where=str(args.output_dir), hint=hint)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._gradients = self._watch.gradient_norms(self.per_layer)  # read only when logged: no wait for the device

    def on_step_end(self, args, state, control, **kwargs):
        if self.check_every and state.global_step % self.check_every == 0:
            self._watch.check()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            values = self._watch.norms(self.per_layer) | self._gradients
            rounded = {name: float(f"{value.item():.6g}") for name, value in values.items()}
            logs.update(rounded)
            state.log_history[-1].update(rounded)

    def on_save(self, args, state, control, **kwargs):
        self._watch.check()
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and (folder / "config.json").is_file():  # not an adapter, not a shard
            try:
                carry_manifest(self.path, folder, replace=True)
            except DeusMergeError as error:  # the weights are saved, and the training may go on
                (folder / MANIFEST).unlink(missing_ok=True)  # an earlier model's
                warnings.warn(f"no manifest for {folder}: {error}", stacklevel=2)

    def on_train_end(self, args, state, control, **kwargs):
        self._watch.check()


def watch(
    trainer: Trainer, path: Path | str, *, check_every: int = 0, per_layer: bool = False, generation: int = -1
) -> NewLayersCallback:
    """Add a `NewLayersCallback` to a trainer, before all other callbacks, so that they receive the values it logs.

    Args:
        trainer: The trainer.
        path, check_every, per_layer, generation: As for `NewLayersCallback`.

    Returns:
        The callback.
    """
    callback = NewLayersCallback(path, check_every=check_every, per_layer=per_layer, generation=generation)
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback
