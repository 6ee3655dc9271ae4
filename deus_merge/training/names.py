"""The parameters of a model, which may be wrapped, by the names in its manifest."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.quantized import is_cache_scale
from ..core.errors import TrainingError
from ..core.tensors import Action
from ..core.text import plural
from ..core.units import ITEMSIZE
from ..report.manifest import Manifest
from .converted import made_from
from .quantized import check_gradients_pass

if TYPE_CHECKING:
    from torch.nn import Module, Parameter

# Modules that wrappers insert between a model's own, at any depth: torch.compile, FSDP, activation checkpointing, and
# peft, where base_layer holds the tensor that it adapts, and original_module a module of which it trains (and saves) a
# copy.
_INSERTED = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|original_module|token_adapter"
    r"|modules_to_save\.[^.]+)\."
)
_COPY = re.compile(r"(.*)\.modules_to_save\.([^.]+)\.")  # which module of peft, for which adapter
_OUTER = re.compile(r"(?:module|base_model|model)\.")  # DistributedDataParallel and DeepSpeed; peft


def plain_name(name: str, planned: Container[str]) -> str:
    """A parameter's name as planned: ``module._orig_mod.model.norm.weight`` -> ``model.norm.weight``.

    A name that was not planned is returned without every part that could be a wrapper's.
    """
    name = _INSERTED.sub("", name)
    while name not in planned and (outer := _OUTER.match(name)):
        name = name[outer.end() :]
    return name


@dataclass(frozen=True)
class Parameters:
    """A model's parameters.

    Attributes:
        base: The parameters in the manifest, by its names; a tied one under each of its names, one that is made from
            several stored tensors under the first of theirs, parts of a quantised weight under their own. For new
            layers that peft saves (``modules_to_save``) they are peft's copies, which the model computes with.
        added: The parameters that peft added.
        copies: The names of peft's copies.
    """

    base: Mapping[str, Parameter]
    added: Mapping[str, Parameter]
    copies: frozenset[str]


def parameters_of(model: Module, manifest: Manifest) -> Parameters:
    """A model's parameters, matched with a manifest.

    Args:
        model: The model, wrapped or not.
        manifest: With ``layer_prefix``.

    Raises:
        TrainingError: the model is not the manifest's: it has more parameters, or fewer; or quantised weights in it
            stop gradients.
    """
    check_gradients_pass(model)
    planned = manifest.model_tensors.keys()
    made = made_from(model, planned)
    parts = {name: tensor.weight for name, tensor in manifest.tensors.items() if tensor.weight}
    known = planned | made.keys() | parts.keys()
    grown = manifest.grown_names
    base: dict[str, Parameter] = {}
    copies: dict[str, Parameter] = {}
    others: dict[str, Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        plain, copy = plain_name(name, known), _COPY.match(name)
        plain = made[plain][0] if plain in made else plain
        if copy is None and (plain in planned or plain in parts):
            base[plain] = parameter
        elif copy is not None and plain in grown and copy[2] in _active(model.get_submodule(copy[1])):
            copies[plain] = parameter
        else:
            others[name] = parameter
    base |= copies
    tied = {id(parameter) for parameter in base.values()}
    others = {name: parameter for name, parameter in others.items() if id(parameter) not in tied}
    marks = ("base_model.", ".base_layer.", ".modules_to_save.")
    adapted = any(mark in name for name, _ in model.named_parameters() for mark in marks)
    beyond = manifest.prefix_of(manifest.num_layers)  # the layer that would follow the last
    more = [name for name in others if not adapted or beyond in name]
    there = base.keys() | {plain_name(name, known) for name, _ in model.named_buffers()}
    there |= {name for whole, names in made.items() if whole in there or names[0] in there for name in names}
    there |= {weight for part, weight in parts.items() if part in there}
    fewer = [name for name in planned if name not in there and not is_cache_scale(name)]
    if more or fewer:
        raise TrainingError(
            "the model is not the one of the manifest",
            where=type(model).__name__,
            expected=f"its {plural(len(planned), 'tensor')}",
            got="; ".join(
                f"{len(names)} {difference}, first {names[0]}"
                for difference, names in (("missing", fewer), ("more", more))
                if names
            ),
            hint="load it with AutoModelForCausalLM from the folder of the manifest, and freeze before FSDP shards it",
        )
    return Parameters(base, others, frozenset(copies))


def _active(wrapper: Any) -> tuple[str, ...]:
    """The adapters whose copies a wrapper of peft computes with."""
    active = wrapper.active_adapter
    return (active,) if isinstance(active, str) else tuple(active)


def check_zeroed(parameters: Parameters, manifest: Manifest, path: Path | str) -> None:
    """Check that no frozen output projection is zero that was not zero when the manifest was written, while new ones
    are trained already: then the manifest is another model's, with as many layers and its new ones at other places.

    Args:
        parameters: The model's.
        manifest: The manifest to check.
        path: Where it is, for the message.

    Raises:
        TrainingError: one is.
    """
    import torch
    import xxhash

    def has_values(name: str) -> bool:
        parameter = parameters.base[name]
        return bool(parameter.numel()) and not parameter.is_meta and bool(torch.any(parameter))

    planned_as = manifest.model_tensors
    zeroed = [name for name in parameters.base if name in planned_as and planned_as[name].action is Action.ZEROS]
    if not any(map(has_values, zeroed)):  # untrained, or without weights as yet
        return
    ends = tuple({re.sub(r".*\.\d+\.", ".", name) for name in zeroed})
    for name, parameter in parameters.base.items():
        planned = planned_as.get(name)
        if planned is None or planned.action is Action.ZEROS or not name.endswith(ends):
            continue
        if planned.xxh3_128 is None or planned.shape is None or planned.dtype is None:
            continue
        if hasattr(parameter, "ds_tensor") or has_values(name):
            continue
        zeros = bytes(prod(planned.shape) * ITEMSIZE[planned.dtype])
        if xxhash.xxh3_128_hexdigest(zeros) != planned.xxh3_128:
            raise TrainingError(
                "the manifest is another model's: a weight that it would freeze is zero, as those of new layers are",
                where=name,
                expected=f"the folder that the model was loaded from, or trained from; not {path}",
                hint="two outputs with as many layers differ in the places of the new ones",
            )
