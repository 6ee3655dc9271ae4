"""A model's parameters under the names of its manifest, whatever it is wrapped in."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import TrainingError
from ..core.units import ITEMSIZE
from ..models.view import prefix_of
from ..report.lineage import grown_names
from ..verify.weights import ALGORITHM

if TYPE_CHECKING:
    from torch.nn import Module, Parameter

# Modules that wrappers put between a model's own, anywhere: torch.compile, FSDP, activation checkpointing, and peft,
# which keeps the tensor it adapts as base_layer, and a module of which it trains (and saves) a copy as original_module.
_BETWEEN = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|original_module|token_adapter"
    r"|modules_to_save\.[^.]+)\."
)
_COPY = re.compile(r"(.*)\.modules_to_save\.([^.]+)\.")  # which module of peft, for which adapter
_AROUND = re.compile(r"(?:module|base_model|model)\.")  # DistributedDataParallel and DeepSpeed; peft


def plain_name(name: str, planned: Container[str]) -> str:
    """A parameter's name as planned: ``module._orig_mod.model.norm.weight`` -> ``model.norm.weight``.

    A name that stays unknown comes back without anything that could be a wrapper's.
    """
    name = _BETWEEN.sub("", name)
    while name not in planned and (around := _AROUND.match(name)):
        name = name[around.end() :]
    return name


@dataclass(frozen=True)
class Parameters:
    """A model's parameters.

    Attributes:
        base: Those of the manifest, by its names; a tied one under each of its names. Of new layers that peft is to
            save (``modules_to_save``) its copy, which is what the model computes with.
        added: What peft put on top.
        copies: Names of those that are peft's copies.
    """

    base: Mapping[str, Parameter]
    added: Mapping[str, Parameter]
    copies: frozenset[str]


def parameters_of(model: Module, record: Mapping) -> Parameters:
    """A model's parameters, matched with a manifest.

    Raises:
        TrainingError: the model is another one than the manifest's: it has parameters more, or fewer.
    """
    planned = record["tensors"].keys()
    grown = grown_names(record)
    base: dict[str, Parameter] = {}
    copies: dict[str, Parameter] = {}
    others: dict[str, Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        plain, copy = plain_name(name, planned), _COPY.match(name)
        if copy is None and plain in planned:
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
    beyond = prefix_of(record["num_layers"], record["layer_prefix"])  # the layer that would follow the last
    more = [name for name in others if not adapted or beyond in name]
    buffers = {plain_name(name, planned) for name, _ in model.named_buffers()}
    fewer = [name for name in planned if name not in base and name not in buffers]
    if more or fewer:
        raise TrainingError(
            "the model is not the one of the manifest",
            where=type(model).__name__,
            expected=f"its {len(planned)} tensors",
            got="; ".join(
                f"{len(names)} {what}, first {names[0]}"
                for what, names in (("missing", fewer), ("more", more))
                if names
            ),
            hint="load it with AutoModelForCausalLM from the folder of the manifest, and freeze before FSDP shards it",
        )
    return Parameters(base, others, frozenset(copies))


def _active(wrapper: Module) -> tuple[str, ...]:
    """The adapters whose copy a wrapper of peft computes with."""
    active = wrapper.active_adapter
    return (active,) if isinstance(active, str) else tuple(active)


def check_zeroed(parameters: Parameters, record: Mapping, path: Path | str) -> None:
    """A frozen output projection that is zero, and was not when the manifest was written, beside new ones that are not:
    the manifest is another model's, of as many layers with new ones at other places.

    Raises:
        TrainingError: it is.
    """
    import torch
    import xxhash

    def weighs(name: str) -> bool:
        parameter = parameters.base[name]
        return bool(parameter.numel()) and not parameter.is_meta and bool(torch.any(parameter))

    tensors = record["tensors"]
    zeroed = [name for name in parameters.base if tensors[name]["action"] == "zeros"]
    if not any(map(weighs, zeroed)):  # untrained, or without weights as yet
        return
    ends = tuple({re.sub(r".*\.\d+\.", ".", name) for name in zeroed})
    for name, parameter in parameters.base.items():
        origin = tensors[name]
        if origin["action"] == "zeros" or not name.endswith(ends) or ALGORITHM not in origin:
            continue
        if hasattr(parameter, "ds_tensor") or weighs(name):
            continue
        zeros = bytes(prod(origin["shape"]) * ITEMSIZE[origin["dtype"]])
        if xxhash.xxh3_128_hexdigest(zeros) != origin[ALGORITHM]:
            raise TrainingError(
                "the manifest is another model's: a weight that it would freeze is zero, as those of new layers are",
                where=name,
                expected=f"the folder that the model was loaded from, or trained from; not {path}",
                hint="two outputs of as many layers differ in where the new ones are",
            )
