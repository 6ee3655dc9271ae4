"""Whether the planned config.json builds the layers that are meant, for families that nobody described.

How a config says which layer is of which kind is known for described families only. For all others transformers builds
the output and its sources without weights, before a tensor is read, and the layers are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import PlanError
from ..models.config_json import Config, section
from ..models.config_rules import LayerEntries
from ..models.layer_facts import expand, listed_keys
from ..models.source import SourceModel
from ..models.stacks import LAYER
from ..models.view import ModelView


@dataclass(frozen=True)
class PlannedStack:
    """A stack of layers of the output.

    Attributes:
        view: The same stack of the donor.
        origins: For each output layer, the layer that it is like.
        title: The stack's name in messages; empty for the main one.
    """

    view: ModelView
    origins: tuple[LayerEntries, ...]
    title: str = ""

    @property
    def in_place(self) -> bool:
        """Whether the layers are as many as the donor's, and in their order."""
        return [origin.layer for origin in self.origins] == list(range(self.view.num_layers))


def check_layer_kinds(
    config: Config, stacks: Sequence[PlannedStack], donor: SourceModel, shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Check that each output layer will be built like the layer that it comes from, and that all tensors will be
    loaded. Costs nothing where layers stay in their places, or the family is described.

    Args:
        config: The output's config.json.
        stacks: Its stacks of layers.
        donor: The model whose config it is.
        shapes: Of the output's tensors, by name.

    Returns:
        Warnings, where it cannot be checked.

    Raises:
        PlanError: a layer would be of another kind, a tensor would not be loaded, or the model could not be built; or
            nothing is known about kinds that the config tells apart.
    """
    unknown = [stack for stack in stacks if stack.view.family is None and not stack.in_place]
    warnings = [warning for stack in unknown for warning in _check(config, stack, donor)]
    if unknown and not warnings:
        warnings += _check_loading(config, donor, shapes)
    return list(dict.fromkeys(warnings))


def _check(config: Config, stack: PlannedStack, donor: SourceModel) -> list[str]:
    from ..models.built import CannotBuild
    from ..models.layer_description import shown
    from ..models.layer_kinds import BuiltStack, LayerOrigin, build_stack, misfits

    prefix = stack.view.layer_prefix
    known: dict[str, BuiltStack] = {}
    try:
        known[str(donor.ref)] = build_stack(donor.checkpoint.config, prefix)
        for origin in stack.origins:
            if origin.model not in known:
                known[origin.model] = build_stack(origin.config, prefix)
    except CannotBuild as error:
        return _unchecked(stack, donor, str(error))
    where = str(donor.ref)
    try:
        output = build_stack(config, prefix)
    except CannotBuild as error:
        raise PlanError(
            "config.json cannot be made to fit the output's layers",
            where=where,
            got=str(error),
            hint=_hint(likely_keys_of(config, stack)),
        ) from None
    planned = len(stack.origins)
    if len(output.layers) != planned:
        raise PlanError(
            "config.json cannot be made to fit the output's depth",
            where=where,
            expected=f"a key that gives {planned} layers",
            got=f"{len(output.layers)} layers in {output.model}",
        )
    origins = [[LayerOrigin(known[o.model], o.layer, o.model)] for o in stack.origins]
    if wrong := misfits(output, origins):
        first = wrong[0]
        difference = first.differences[0]
        raise PlanError(
            f"layer {first.layer} of the output would be of another kind than layer {first.origin.layer} of"
            f" {first.origin.name}, which it comes from",
            where=where,
            expected=f"{difference.what}: {shown(difference.theirs)}",
            got=shown(difference.ours) + (f" ({len(wrong)} layers differ)" if len(wrong) > 1 else ""),
            hint=_hint(first.keys),
        )
    return []


def _check_loading(config: Config, donor: SourceModel, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A warning where it is not known what transformers would load.

    Raises:
        PlanError: it would load less than of the donor. A tensor outside of the layers may have a part for each layer.
    """
    from ..models.built import build, resolved_config
    from ..models.load_report import CannotReport, load_report

    where = str(donor.ref)
    try:
        report = load_report(build(resolved_config(config)), shapes)
        if report.clean:
            return []
        own = {name: tensor.shape for name, tensor in donor.checkpoint.tensors.items()}
        base = load_report(build(resolved_config(donor.checkpoint.config)), own)
    except CannotReport as error:
        return [f"{where}: {error}"]
    if worse := report.worse_than(base, lambda name: _in_any_layer(name, donor.view.num_layers)):
        raise PlanError(
            "transformers would not load the output as it loads the model it is made from",
            where=where,
            got=worse[0] + (f" ({len(worse)} names)" if len(worse) > 1 else ""),
            hint="this family keeps something for each layer outside of its layers: leave its depth as it is",
        )
    return []


def _in_any_layer(name: str, depth: int) -> list[str]:
    """The names that a tensor of a layer has in every layer of a model."""
    match = LAYER.fullmatch(name)
    if match is None:
        return [name]
    return [f"{match['prefix']}.{layer}.{match['suffix']}" for layer in range(depth)]


def _unchecked(stack: PlannedStack, donor: SourceModel, reason: str) -> list[str]:
    """A warning where transformers cannot build the model, and all its layers seem to be of one kind.

    Raises:
        PlanError: the config, or the tensors, tell layers apart.
    """
    where = str(donor.ref)
    keys = likely_keys_of(donor.checkpoint.config, stack)
    kinds = {frozenset(donor.shapes(layer).items()) for layer in stack.view.layers}
    if keys or len(kinds) > 1:
        raise PlanError(
            "it is not known which layers of this model are of which kind, so its layers cannot change places",
            where=where,
            expected="layers of one kind, or a family that is described or that transformers can build",
            got=f"{reason}; " + (f"config.json has {', '.join(keys)}" if keys else f"{len(kinds)} kinds of layers"),
            hint="merges that keep every layer in its place work",
        )
    return [f"{where}: {reason}, so it was not checked that the output's layers are built like those they come from"]


def likely_keys_of(config: Config, stack: PlannedStack) -> tuple[str, ...]:
    """Keys that tell layers apart, without lists that have an entry for each layer and move with it."""
    from ..models.layer_kinds import likely_keys

    path = stack.view.layers_path
    try:
        own = listed_keys(config, path, expand(config, path, stack.view.model_type))
        part = section(config, path)
    except KeyError:
        own, part = (), config
    unused = () if part.get("use_sliding_window") else ("max_window_layers",)
    silent = {*own, *unused, *(k for k, v in part.items() if isinstance(v, Mapping) or v in (None, False, []))}
    return likely_keys({key: value for key, value in part.items() if key not in silent}, ())


def _hint(keys: Sequence[str]) -> str:
    if not keys:
        return "take layers so that each keeps its kind, or leave the depth as it is"
    return f"config.json's {', '.join(keys)} may decide about it: take layers so that each keeps its kind"
