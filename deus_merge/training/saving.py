"""Saves a trained model as the output it was loaded from, with other new layers: the base stays as it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import Checkpoint, OutputFolder, TensorEntry, index_json, plan_shards
from ..checkpoint.header import read_small
from ..checkpoint.index import INDEX
from ..core.errors import CheckpointError, TrainingError
from ..core.tensors import StoredTensor
from ..core.text import plural
from ..core.units import parse_size, torch_dtype
from ..models.side_files import copied_files
from ..report.manifest import Manifest, check_belongs
from ..report.plan_manifest import sha256
from ..run.preflight import check_apart
from .carry import carry
from .converted import made_from
from .freeze import read_training
from .names import parameters_of
from .quantized import prepare

if TYPE_CHECKING:
    import torch
    from torch.nn import Module


def save_trained(
    model: Module,
    source: Path | str,
    target: Path | str,
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    all_layers: bool = False,
) -> tuple[str, ...]:
    """Write the folder that a model was loaded from once more, with the weights that were trained.

    All others are copied from file to file: the base keeps its bytes in whatever dtype the model was loaded, and
    quantised weights keep their codes also where transformers dequantised them. The trained weights get the dtype that
    they are stored in. The manifest comes with them, as by `carry_manifest`.

    Args:
        model: The model, wrapped or not, with the new layers (and nothing else) trainable, as `freeze_base` leaves it;
            with ``all_layers`` the base may be trainable, too.
        source: The folder that it was loaded from, with its manifest.
        target: The folder to write; it appears when it is complete.
        max_shard_size: Upper bound of an output file.
        overwrite: Replace an existing ``target``.
        all_layers: Whether the base was trained, too. The manifest then says so: ``verify`` does not compare it with
            the model that was grown, and ``strip`` writes it as it is now.

    Returns:
        The names of the tensors that the model's values were written to.

    Raises:
        CheckpointError, TrainingError: as `freeze_base`; or no weight trains, one of the base does, there are adapters,
            or a trained weight is not stored in floating point.
        PlanError: ``target`` exists.
    """
    source, target = Path(source), Path(target)
    manifest = read_training(source)
    checkpoint = Checkpoint.open(source)
    check_belongs(manifest, checkpoint, hint="name the folder that the model was loaded from")
    trained = _trained(model, manifest, checkpoint.tensors, all_layers)
    entries = [TensorEntry(name, stored.dtype, stored.shape) for name, stored in checkpoint.tensors.items()]
    shards = plan_shards([[entry] for entry in entries], parse_size(max_shard_size))
    files = {name: c if isinstance(c, bytes) else read_small(c) for name, c in copied_files(checkpoint).items()}
    files["config.json"] = read_small(source / "config.json")
    if len(shards) > 1:
        files[INDEX] = index_json(shards)
    output = OutputFolder(target, plan_hash=sha256(f"train {manifest.plan_hash}".encode()), overwrite=overwrite)
    check_apart(output.out, [checkpoint])
    with output:
        writer = output.shards(shards)
        writer.copy_many((name, stored) for name, stored in checkpoint.tensors.items() if name not in trained)
        for name, tensor in trained.items():
            writer.write_tensor(name, tensor.detach().to(torch_dtype(checkpoint.tensors[name].dtype)))
        for name, content in files.items():
            output.put(name, content)
        carry(source, output.folder, all_layers=all_layers, home=output.out)
        output.finish()
    return tuple(trained)


def _trained(
    model: Module, manifest: Manifest, stored: Mapping[str, StoredTensor], all_layers: bool
) -> dict[str, torch.Tensor]:
    """The trained tensors by the names that they are stored under."""
    parameters = parameters_of(model, manifest)
    trained = {name: parameter for name, parameter in parameters.base.items() if parameter.requires_grad}
    kept = {id(parameter) for name, parameter in trained.items() if name in stored}
    trained = {n: p for n, p in trained.items() if n in stored or id(p) not in kept}  # a tied one is stored once
    if parameters.added:
        raise TrainingError(
            "the model has adapters, which would be lost",
            where=next(iter(parameters.added)),
            expected="a model without adapters",
            hint="save the adapter (model.save_pretrained), and merge it with a recipe: model: FOLDER+ADAPTER",
        )
    if not trained:
        raise TrainingError("no weight of this model trains, so none is new", hint="call freeze_base before training")
    prepare(model)
    values: dict[str, torch.Tensor] = {}
    for name, names in made_from(model, manifest.model_tensors).items():
        if names[0] in trained:
            values |= _split(model, name, trained.pop(names[0]), names)
    values |= trained
    for name, tensor in values.items():
        if name not in manifest.grown_names and not all_layers:
            raise TrainingError(
                "a weight of the base trains",
                where=name,
                hint="call freeze_base before training; or all_layers=True, if the base was to train, too",
            )
        if hasattr(tensor, "ds_tensor") or hasattr(tensor, "to_local"):
            raise TrainingError(
                "a weight is split up between processes",
                where=name,
                hint="let the trainer save the model, then call carry_manifest",
            )
        if manifest.model_tensors[name].weight is not None or name not in stored:
            raise TrainingError(
                "a trained weight is stored quantised",
                where=name,
                expected="floating point",
                hint="save_pretrained, then carry_manifest; or grow the model without quantize_new",
            )
        if tuple(tensor.shape) != stored[name].shape:
            raise CheckpointError(
                "a weight has another shape than its file",
                where=name,
                expected=list(stored[name].shape),
                got=list(tensor.shape),
            )
    return values


def _split(model: Module, name: str, parameter: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """The stored tensors that a parameter is made from, as transformers saves them."""
    from transformers.core_model_loading import revert_weight_conversion

    inner = next(m for m in model.modules() if hasattr(m, "base_model_prefix") and hasattr(m, "config"))
    found = revert_weight_conversion(inner, {name: parameter.detach()})  # pyright: ignore[reportArgumentType]
    if found.keys() != set(names):
        raise TrainingError(
            "transformers does not save a weight as it is stored",
            where=name,
            expected=f"{plural(len(names), 'tensor')}, first {names[0]}",
            got=f"{plural(len(found), 'tensor')}, first {next(iter(found), None)}",
        )
    return dict(found)
