"""Which tensors of an output are calibrated: the zeroed linear writers of its new layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...checkpoint.reader import Checkpoint
from ...checkpoint.tensor_source import TensorSource
from ...core.errors import TrainingError
from ...core.tensors import Action
from ...core.text import some_of
from ...core.units import FLOAT_DTYPES
from ...models.spec import RESIDUAL, TensorSpec
from ...models.view import ModelView
from ...report.manifest import MANIFEST, Manifest
from ...verify.weights import ZEROS, TensorCheck, examine
from ..freeze import new_layers
from .layer_runner import LayerRunner

if TYPE_CHECKING:
    from torch.nn import Linear


@dataclass(frozen=True)
class Writer:
    """A zeroed matrix that writes to the residual stream.

    Attributes:
        tensor: The name of its stored tensor.
        dtype: safetensors dtype code.
        rows: The size of a hidden state, d.
        columns: What it reads.
    """

    tensor: str
    dtype: str
    rows: int
    columns: int

    def module(self, runner: LayerRunner) -> Linear:
        """Its module in the model."""
        import torch

        found = runner.module(self.tensor.removesuffix(".weight"))
        assert isinstance(found, torch.nn.Linear)
        return found


@dataclass
class Writers:
    """The writers of all new layers.

    Attributes:
        layers: The writers of each new layer that are calibrated.
        skipped: A reason -> the names of the tensors that stay zero for it.
    """

    layers: dict[int, tuple[Writer, ...]] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def add(self, layer: int, names: Sequence[str], view: ModelView, source: TensorSource, runner: LayerRunner) -> None:
        """Add those writers of a layer whose values have a closed form.

        Args:
            layer: The layer.
            names: Its writers.
            view: The model by layer and role.
            source: Its tensors.
            runner: Its modules.
        """
        import torch

        writers = []
        roles = {name: role for role, name in view.layers[layer].items()}
        for name in names:
            stored, spec = source.tensors[name], view.spec(roles[name], layer)
            reason = _obstacle(spec, view.specs[layer]) if spec else "it is not described"
            if reason is None and (stored.quantization or stored.dtype not in FLOAT_DTYPES.values()):
                reason = "it is quantised"
            if reason is None and not isinstance(runner.module(name.removesuffix(".weight")), torch.nn.Linear):
                reason = "it is not a linear layer in transformers"
            if reason is not None:
                self.skipped.setdefault(reason, []).append(name)
                continue
            writers.append(Writer(name, stored.dtype, *stored.shape))
        if writers:
            self.layers[layer] = tuple(writers)

    @property
    def notes(self) -> tuple[str, ...]:
        """What stays zero, and why."""
        return tuple(f"{some_of(names, 2)}: zero as before, {reason}" for reason, names in self.skipped.items())


def check_untrained(manifest: Manifest, checkpoint: Checkpoint) -> tuple[int, ...]:
    """Check that an output's new layers are as they were made, and add nothing.

    Returns:
        The new layers.

    Raises:
        TrainingError: they were trained or calibrated, or change what the model computes; or there is none.
    """
    layers = new_layers(manifest)
    where = checkpoint.folder / MANIFEST
    if manifest.calibration is not None:
        raise TrainingError("the output is calibrated already", where=where, hint="name the one it was made from")
    if manifest.trained:
        hint = "calibrate first, then train"
        raise TrainingError("the new layers have been trained already", where=where, hint=hint)
    names = [name for name in manifest.new_parameters if _planned(manifest, name) is Action.ZEROS]
    empty = {layer for layer in layers if any(name.startswith(manifest.prefix_of(layer)) for name in names)}
    if not manifest.function_preserving or empty != set(layers):
        raise TrainingError(
            "the new layers change what the model computes",
            where=where,
            expected="new layers with zeroed outputs: presets opt_deus, llama_pro, copy_prev, copy_next",
            hint="calibrate sets outputs that are zero; these are not",
        )
    stored = [tensor for name in names for tensor in _stored(manifest, checkpoint, name)]
    results = examine((TensorCheck(tensor, ZEROS) for tensor in stored), finite=False)
    if wrong := [name for name, result in results.items() if not result.equal]:
        raise TrainingError(
            "a new layer is not zero any more: it was trained",
            where=wrong[0],
            expected="zeros, as the manifest says",
            hint="calibrate the output as it was before training",
        )
    return layers


def residual_writers(view: ModelView, layer: int) -> list[str]:
    """The tensors of a layer that write to the residual stream, biases included."""
    found = ((name, view.spec(role, layer)) for role, name in view.layers[layer].items())
    return [name for name, spec in found if spec is not None and spec.writes_residual]


def find_writers(manifest: Manifest, view: ModelView, source: TensorSource, runner: LayerRunner) -> Writers:
    """The tensors of the new layers that are calibrated.

    Raises:
        TrainingError: there is none.
    """
    found = Writers()
    for layer in new_layers(manifest):
        zeroed = [name for name in residual_writers(view, layer) if _planned(manifest, name) is Action.ZEROS]
        found.add(layer, zeroed, view, source, runner)
    if not found.layers:
        reasons = "; ".join(found.notes) or "no zeroed matrix"
        raise TrainingError(f"no output of {view.model_type!r} can be calibrated", where=source.where, got=reasons)
    return found


def _obstacle(spec: TensorSpec, layer: Mapping[str, TensorSpec]) -> str | None:
    """The reason why a writer cannot be calibrated; None where it can."""
    if spec.in_space is None:
        return "a bias"
    if spec.opaque:
        return "nothing is known about what it reads"
    if spec.layout is not None:
        return "it is stored transposed, or together with other matrices"
    if "." in spec.role:
        return "it is an expert's"
    groups = {spec.role, spec.role.partition(".")[0]}
    behind = (s for s in layer.values() if s.multiplies and s.out_space == RESIDUAL and s.follows in groups)
    if norm := next(behind, None):
        return f"{norm.name} behind it makes any output as large as any other"
    return None


def _planned(manifest: Manifest, name: str) -> Action | None:
    planned = manifest.model_tensors.get(name)
    return planned.action if planned else None


def _stored(manifest: Manifest, checkpoint: Checkpoint, name: str) -> list:
    """The stored tensors of a new parameter that were written as zeros: itself, or parts of a quantised one."""
    parts = [n for n, t in manifest.tensors.items() if (n == name or t.weight == name) and t.action is Action.ZEROS]
    return [checkpoint.tensors[n] for n in parts if n in checkpoint.tensors]
