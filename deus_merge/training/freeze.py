"""The new parameters of a manifest: their names, freezing all others, and parameter groups for the optimizer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import TrainingError
from ..core.tensors import Action
from ..core.text import plural
from ..models.family import families
from ..models.spec import RESIDUAL
from ..report.manifest import MANIFEST, Manifest, read_manifest
from ..report.manifest_parts import ManifestTensor
from .names import Parameters, check_zeroed, parameters_of
from .quantized import cast, is_codes, prepare, size

if TYPE_CHECKING:
    import torch
    from torch.nn import Module


@dataclass(frozen=True)
class Trainable:
    """The result of `freeze_base`. ``str()`` describes it in one line.

    Attributes:
        layers: The new layers.
        trained_tensors: The number of tensors that train.
        trained_parameters: The number of elements in them.
        frozen_tensors: The number of tensors that stay as they are; tied ones count once.
        frozen_parameters: The number of elements in them.
        quantized_tensors: How many of them are quantised in memory.
        added_tensors: The number of tensors that peft added; they were left as they are.
        dtype: The least precise dtype of the weights that train.
        unsaved: New modules that peft's ``save_pretrained`` would leave out; `UNSAVED` says what to do.
        normed: Whether a norm stands behind tensors that began as zeros: it makes the smallest step of theirs large.
    """

    layers: tuple[int, ...]
    trained_tensors: int
    trained_parameters: int
    frozen_tensors: int
    frozen_parameters: int
    quantized_tensors: int = 0
    added_tensors: int = 0
    dtype: str = "float32"
    unsaved: tuple[str, ...] = ()
    normed: bool = False

    def __str__(self) -> str:
        share = self.trained_parameters / max(1, self.trained_parameters + self.frozen_parameters)
        quantized = f", {self.quantized_tensors} of the tensors quantised" if self.quantized_tensors else ""
        added = (
            f"; {plural(self.added_tensors, 'tensor')} of adapters are left as they are" if self.added_tensors else ""
        )
        return (
            f"{'layers' if self.layers[1:] else 'layer'} {', '.join(map(str, self.layers))}"
            f" {'train' if self.layers[1:] else 'trains'}: {plural(self.trained_tensors, 'tensor')},"
            f" {self.trained_parameters:,} parameters ({share:.1%}); {plural(self.frozen_tensors, 'tensor')},"
            f" {self.frozen_parameters:,} parameters are frozen{quantized}{added}{self._advice()}"
        )

    def _advice(self) -> str:
        advice = ""
        if self.dtype in _COARSE:
            advice += f"; in {self.dtype} small steps are lost: {_WIDER}"
        if self.unsaved:
            advice += f"; {UNSAVED.format(list(self.unsaved))}"
        if self.normed:
            advice += (
                "; norms behind the zeroed tensors make their first step large whatever its size: begin with a learning"
                " rate of 1e-6 to 1e-5 for them (optimizer_groups: zeroed_lr)"
            )
        return advice


UNSAVED = (
    "peft saves adapters alone, without the new layers: give it modules_to_save={}, or merge the"
    " adapter into the model before that is saved"
)
_COARSE = ("bfloat16", "float16")
_WIDER = "load the model with dtype=torch.float32, or give freeze_base that dtype (a quantised model is not loaded so)"
_LAYER = re.compile(r".*?\.\d+(?=\.)")  # the module of a layer, at the beginning of a tensor's name


def read_training(path: Path | str) -> Manifest:
    """A manifest with ``layer_prefix``, which training needs.

    Args:
        path: An output folder, or its manifest.

    Raises:
        CheckpointError: there is none, or it lacks ``layer_prefix``.
        VerifyError: it cannot be read.
    """
    return read_manifest(Path(path), ("layer_prefix",))


def new_layers(manifest: Manifest, generation: int = -1) -> tuple[int, ...]:
    """The layers of one growth, as they are numbered now.

    Args:
        manifest: The output's manifest.
        generation: -1 for the last growth, 0 for the oldest.

    Raises:
        TrainingError: no such growth, or none of its layers is in the output.
    """
    grown = manifest.growths
    if not -len(grown) <= generation < len(grown):
        raise TrainingError(
            "no such generation", expected=f"0 (the oldest) to {len(grown) - 1}, or -1 (the last)", got=generation
        )
    layers = grown[generation].new_layers
    if not layers:
        hint = "nothing was added to the main stack: deus-merge upscale adds layers"
        hint += "; or name an earlier growth" if len(grown) > 1 else ""
        raise TrainingError("there is no new layer to train", where=MANIFEST, hint=hint)
    return layers


def new_parameters(path: Path | str, generation: int = -1) -> tuple[str, ...]:
    """The exact names of the tensors to train.

    Args:
        path: An output folder, or its manifest.
        generation: The growth, when a grown model was grown again: -1 for the last, 0 for the oldest.

    Raises:
        CheckpointError, VerifyError: there is no manifest, or it cannot be read.
        TrainingError: no such growth, or no new layer.
    """
    return new_names(read_training(path), generation)


def new_names(manifest: Manifest, generation: int = -1) -> tuple[str, ...]:
    """The names of `new_parameters`, from a manifest."""
    layers = new_layers(manifest, generation)
    if generation in (-1, len(manifest.growths) - 1):
        return manifest.new_parameters
    prefixes = tuple(map(manifest.prefix_of, layers))
    return tuple(name for name in manifest.model_tensors if name.startswith(prefixes))


def freeze_base(
    model: Module, path: Path | str, generation: int = -1, *, dtype: torch.dtype | None = None
) -> Trainable:
    """Let only the new layers of a model train. A second call changes nothing.

    The model may be wrapped (torch.compile, DistributedDataParallel, accelerate, peft). Tensors that peft added are
    left as they are; peft freezes everything else, so call this after it, and before DistributedDataParallel.

    Args:
        model: The model, loaded from the folder (or from a checkpoint of its training).
        path: The output folder, or its manifest.
        generation: As for `new_parameters`.
        dtype: A dtype to cast all weights to that are not quantised: float32 for new layers over a quantised base,
            which transformers loads in the dtype that they are stored in.

    Returns:
        The counts of trained and frozen tensors, with advice.

    Raises:
        CheckpointError, TrainingError: as `new_parameters`; or the model is not the manifest's, or cannot train
            (quantised new weights, a frozen weight through which no gradient passes, a new tensor tied to a frozen
            one), or DistributedDataParallel already wraps it.
    """
    manifest = read_training(path)
    if not hasattr(model, "named_parameters"):
        raise TrainingError("not a model", expected="a torch module, then its folder", got=repr(model))
    parameters = parameters_of(model, manifest)
    check_zeroed(parameters, manifest, path)
    new = parameters.base.keys() & new_names(manifest, generation)  # without buffers
    trained = {id(p): p for name, p in parameters.base.items() if name in new}
    frozen = {id(p): p for name, p in parameters.base.items() if name not in new}
    for name in new:
        parameter = parameters.base[name]
        if id(parameter) in frozen:
            raise TrainingError("a new tensor is tied to one that must stay frozen", where=name)
        if is_codes(parameter):
            raise TrainingError(
                "a new tensor cannot be trained",
                where=name,
                expected="floating point",
                got=f"{parameter.dtype}, quantised",
                hint="grow the model without quantize_new, and load it as it is stored; or, quantising it on loading,"
                " leave the new layers out (llm_int8_skip_modules)",
            )
    settings = [*((p, True) for p in trained.values()), *((p, False) for p in frozen.values())]
    distributed = any(type(module).__name__ == "DistributedDataParallel" for module in model.modules())
    if distributed and any(parameter.requires_grad is not trains for parameter, trains in settings):
        raise TrainingError(
            "DistributedDataParallel has already registered the parameters that train",
            hint="call freeze_base before it wraps the model: other parameters would differ between processes",
        )
    for parameter, trains in settings:
        parameter.requires_grad_(trains)
    if dtype is not None:
        cast(model.parameters(), dtype)
    prepare(model)
    dtypes = {str(p.dtype).removeprefix("torch.") for p in trained.values()}
    return Trainable(
        layers=new_layers(manifest, generation),
        trained_tensors=len(trained),
        trained_parameters=sum(map(size, trained.values())),
        frozen_tensors=len(frozen),
        frozen_parameters=sum(map(size, frozen.values())),
        quantized_tensors=sum(map(is_codes, frozen.values())),
        added_tensors=len(parameters.added),
        dtype=next((d for d in _COARSE if d in dtypes), ", ".join(sorted(dtypes))),
        unsaved=unsaved(parameters, new),
        normed=is_normed(model, manifest, new),
    )


def is_normed(model: Module, manifest: Manifest, new: Iterable[str]) -> bool:
    """Whether new tensors began as zeros and have norms behind them."""
    new = set(new)
    if not any(planned.action is Action.ZEROS for name, planned in manifest.model_tensors.items() if name in new):
        return False
    configs = (getattr(module, "config", None) for module in model.modules())
    types = {getattr(config, "model_type", None) for config in configs}
    norms = tuple(
        f".{spec.name}"
        for family in families().values()
        if types & set(family.model_types)
        for spec in family.tensors
        if spec.multiplies and spec.out_space == RESIDUAL
    )
    return bool(norms) and any(name.endswith(norms) for name in new)


def unsaved(parameters: Parameters, new: Iterable[str]) -> tuple[str, ...]:
    """The modules for `Trainable.unsaved`: layers with new tensors that peft, if it is used, would not save."""
    if not parameters.added and not parameters.copies:
        return ()
    left_out = sorted(set(new) - parameters.copies)
    layers = (_LAYER.match(name) for name in left_out)
    return tuple(dict.fromkeys(layer[0] for layer in layers if layer))


def optimizer_groups(
    model: Module, path: Path | str, *, lr: float, zeroed_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict]:
    """Parameter groups for any torch optimizer, with every parameter that trains.

    Args:
        model: As `freeze_base` left it.
        path: The output folder, or its manifest.
        lr: The learning rate.
        zeroed_lr: The learning rate of tensors that began as zeros: until they have grown, the rest of a layer does not
            learn. None for ``lr``. With norms behind them (Gemma 2 and 3, OLMo 2, GLM-4) their first step is made as
            large as any: 1e-6 to 1e-5 is enough, and more can raise the loss before it falls.
        weight_decay: The weight decay of matrices; norms and biases have none.

    Returns:
        ``name``, ``params``, ``lr`` and ``weight_decay`` of each group: zeroed and other matrices, vectors (those that
        began as zeros apart), tensors that peft added.

    Raises:
        CheckpointError, TrainingError: as `freeze_base`; or nothing trains.
    """
    manifest = read_training(path)
    parameters = parameters_of(model, manifest)
    groups: dict[str, dict[str, Any]] = {
        "zeroed": {"params": [], "lr": lr if zeroed_lr is None else zeroed_lr, "weight_decay": weight_decay},
        "matrices": {"params": [], "lr": lr, "weight_decay": weight_decay},
        "vectors": {"params": [], "lr": lr, "weight_decay": 0.0},
        "zeroed vectors": {"params": [], "lr": lr if zeroed_lr is None else zeroed_lr, "weight_decay": 0.0},
        "added": {"params": [], "lr": lr, "weight_decay": weight_decay},
    }
    seen = set()
    for name, parameter in [*parameters.base.items(), *parameters.added.items()]:
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            groups[_group(manifest.model_tensors.get(name), parameter.ndim)]["params"].append(parameter)
    if not seen:
        raise TrainingError("no parameter of this model trains", hint="call freeze_base first")
    return [{"name": name, **group} for name, group in groups.items() if group["params"]]


def _group(planned: ManifestTensor | None, ndim: int) -> str:
    if planned is None:
        return "added"
    if planned.action is Action.ZEROS:
        return "zeroed vectors" if ndim < 2 else "zeroed"
    return "vectors" if ndim < 2 else "matrices"
