"""From the manifest: the new parameters, a model of which only they train, groups for its optimizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import TrainingError
from ..models.view import prefix_of
from ..report.lineage import generations
from ..report.manifest import MANIFEST, read_manifest
from .names import Parameters, check_zeroed, parameters_of

if TYPE_CHECKING:
    from torch.nn import Module


@dataclass(frozen=True)
class Trainable:
    """What `freeze_base` did. ``str()`` tells it in one line.

    Attributes:
        layers: The new layers.
        trained_tensors: How many tensors train.
        trained_parameters: The numbers in them.
        frozen_tensors: How many tensors stay as they are; tied ones count once.
        frozen_parameters: The numbers in them.
        added_tensors: Tensors that peft put on top; they were left as they are.
        dtype: Of the weights that train, the least precise.
        unsaved: New modules that peft's ``save_pretrained`` would leave out; `UNSAVED` tells what to do.
    """

    layers: tuple[int, ...]
    trained_tensors: int
    trained_parameters: int
    frozen_tensors: int
    frozen_parameters: int
    added_tensors: int = 0
    dtype: str = "float32"
    unsaved: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = self.trained_parameters / max(1, self.trained_parameters + self.frozen_parameters)
        added = f"; {self.added_tensors} tensors of adapters are left as they are" if self.added_tensors else ""
        return (
            f"layers {', '.join(map(str, self.layers))} train: {self.trained_tensors} tensors,"
            f" {self.trained_parameters:,} parameters ({share:.1%}); {self.frozen_tensors} tensors,"
            f" {self.frozen_parameters:,} parameters are frozen{added}{self._advice()}"
        )

    def _advice(self) -> str:
        told = ""
        if self.dtype in _COARSE:
            told += f"; in {self.dtype} small steps are lost: load the model with dtype=torch.float32"
        if self.unsaved:
            told += f"; {UNSAVED.format(list(self.unsaved))}"
        return told


UNSAVED = (
    "peft saves adapters alone, without the new layers: give it modules_to_save={}, or merge the"
    " adapter into the model before that is saved"
)
_COARSE = ("bfloat16", "float16")
_LAYER = re.compile(r".*?\.\d+(?=\.)")  # the module of a layer, at the beginning of a tensor's name


def read_training(path: Path | str) -> dict:
    """A manifest with all that training needs of it.

    Raises:
        CheckpointError: there is none, or none that can be read.
    """
    return read_manifest(Path(path), ("new_layers", "new_parameters", "num_layers", "layer_prefix"))


def new_layers(record: Mapping, generation: int = -1) -> tuple[int, ...]:
    """The layers of one growth, as they are numbered now.

    Raises:
        TrainingError: no such growth, or none of its layers is there.
    """
    grown = generations(record)
    if not -len(grown) <= generation < len(grown):
        raise TrainingError(
            "no such generation", expected=f"0 (the oldest) to {len(grown) - 1}, or -1 (the last)", got=generation
        )
    layers = tuple(grown[generation]["new_layers"])
    if not layers:
        hint = "nothing was put into the main stack" + ("; name an earlier growth" if len(grown) > 1 else "")
        raise TrainingError("there is no new layer to train", where=MANIFEST, hint=hint)
    return layers


def new_parameters(path: Path | str, generation: int = -1) -> tuple[str, ...]:
    """The exact names of the tensors to train.

    Args:
        path: An output folder, or its manifest.
        generation: Which growth's, when a grown model was grown again: -1 the last, 0 the oldest.

    Raises:
        CheckpointError: there is no manifest, or none that can be read.
        TrainingError: no such growth, or no new layer.
    """
    return new_names(read_training(path), generation)


def new_names(record: Mapping, generation: int = -1) -> tuple[str, ...]:
    """`new_parameters` of a manifest that is read already."""
    layers = new_layers(record, generation)
    if generation in (-1, len(generations(record)) - 1):
        return tuple(record["new_parameters"])
    prefixes = tuple(prefix_of(layer, record["layer_prefix"]) for layer in layers)
    return tuple(name for name in record["tensors"] if name.startswith(prefixes))


def freeze_base(model: Module, path: Path | str, generation: int = -1) -> Trainable:
    """Let only the new layers of a model train. Doing it twice changes nothing.

    Wrappers around the model are seen through (torch.compile, DistributedDataParallel, accelerate, peft). What peft
    added is left as it is; peft freezes everything else, so call this after it, and before DistributedDataParallel.

    Args:
        model: The model, loaded from the folder (or from a checkpoint of its training).
        path: The output folder, or its manifest.
        generation: As for `new_parameters`.

    Returns:
        What trains now, and what does not.

    Raises:
        CheckpointError, TrainingError: as `new_parameters`; or the model is not the manifest's, or cannot train
            (quantised weights, a new tensor tied to a frozen one), or it is too late for it.
    """
    record = read_training(path)
    if not hasattr(model, "named_parameters"):
        raise TrainingError("not a model", expected="a torch module, then its folder", got=repr(model))
    parameters = parameters_of(model, record)
    check_zeroed(parameters, record, path)
    new = parameters.base.keys() & new_names(record, generation)  # without buffers
    trained = {id(p): p for name, p in parameters.base.items() if name in new}
    frozen = {id(p): p for name, p in parameters.base.items() if name not in new}
    for name in new:
        parameter = parameters.base[name]
        if id(parameter) in frozen:
            raise TrainingError("a new tensor is tied to one that must stay frozen", where=name)
        if not parameter.is_floating_point():
            raise TrainingError(
                "a new tensor cannot be trained",
                where=name,
                expected="floating point",
                got=parameter.dtype,
                hint="load the model without quantisation, or keep the new layers out of it",
            )
    wanted = [*((p, True) for p in trained.values()), *((p, False) for p in frozen.values())]
    noted = any(type(module).__name__ == "DistributedDataParallel" for module in model.modules())
    if noted and any(parameter.requires_grad is not trains for parameter, trains in wanted):
        raise TrainingError(
            "DistributedDataParallel has already noted what trains",
            hint="call freeze_base before it wraps the model: what it does not know of would differ between processes",
        )
    for parameter, trains in wanted:
        parameter.requires_grad_(trains)
    counts = (n for part in (trained, frozen) for n in (len(part), sum(map(_size, part.values()))))
    dtypes = {str(p.dtype).removeprefix("torch.") for p in trained.values()}
    return Trainable(
        new_layers(record, generation),
        *counts,
        added_tensors=len(parameters.added),
        dtype=next((d for d in _COARSE if d in dtypes), ", ".join(sorted(dtypes))),
        unsaved=unsaved(parameters, new),
    )


def unsaved(parameters: Parameters, new: Iterable[str]) -> tuple[str, ...]:
    """`Trainable.unsaved`: layers with new tensors of which peft, where it is there, has no copy to save."""
    if not parameters.added and not parameters.copies:
        return ()
    left_out = sorted(set(new) - parameters.copies)
    return tuple(dict.fromkeys(_LAYER.match(name)[0] for name in left_out))


def optimizer_groups(
    model: Module, path: Path | str, *, lr: float, zeroed_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict]:
    """Parameter groups for any torch optimizer, of all that trains.

    Args:
        model: As `freeze_base` left it.
        path: The output folder, or its manifest.
        lr: The learning rate.
        zeroed_lr: Another one for tensors that began as zero: until they have grown, nothing else of a layer learns.
        weight_decay: Of matrices; norms and biases have none.

    Returns:
        ``name``, ``params``, ``lr`` and ``weight_decay`` of each: zeroed and other matrices, vectors, what peft added.

    Raises:
        CheckpointError, TrainingError: as `freeze_base`; or nothing trains.
    """
    record = read_training(path)
    parameters = parameters_of(model, record)
    groups = {
        "zeroed": {"params": [], "lr": lr if zeroed_lr is None else zeroed_lr, "weight_decay": weight_decay},
        "matrices": {"params": [], "lr": lr, "weight_decay": weight_decay},
        "vectors": {"params": [], "lr": lr, "weight_decay": 0.0},
        "added": {"params": [], "lr": lr, "weight_decay": weight_decay},
    }
    seen = set()
    for name, parameter in [*parameters.base.items(), *parameters.added.items()]:
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            groups[_group(record["tensors"].get(name), parameter.ndim)]["params"].append(parameter)
    if not seen:
        raise TrainingError("nothing of this model trains", hint="call freeze_base first")
    return [{"name": name, **group} for name, group in groups.items() if group["params"]]


def _group(origin: Mapping | None, ndim: int) -> str:
    if origin is None:
        return "added"
    return "vectors" if ndim < 2 else "zeroed" if origin["action"] == "zeros" else "matrices"


def _size(parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # DeepSpeed's ZeRO-3 leaves an empty tensor behind
