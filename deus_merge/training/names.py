"""A model's parameters under the names of its manifest, whatever it is wrapped in."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..architecture import prefix_of
from ..errors import TrainingError
from ..report.lineage import generations

if TYPE_CHECKING:
    from torch.nn import Module, Parameter

# Modules that wrappers put between a model's own, anywhere: torch.compile, FSDP, activation checkpointing, and peft,
# which keeps the tensor it adapts as base_layer, and a module of which it trains (and saves) a copy as original_module.
_BETWEEN = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|original_module"
    r"|modules_to_save\.[^.]+)\."
)
_COPY = re.compile(r"(?:\.|^)modules_to_save\.")
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
    grown = tuple(
        prefix_of(layer, record["layer_prefix"]) for growth in generations(record) for layer in growth["new_layers"]
    )
    base: dict[str, Parameter] = {}
    copies: dict[str, Parameter] = {}
    others: dict[str, Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        plain = plain_name(name, planned)
        if plain not in planned:
            others[name] = parameter
        elif not _COPY.search(name):
            base[plain] = parameter
        elif plain.startswith(grown):
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
