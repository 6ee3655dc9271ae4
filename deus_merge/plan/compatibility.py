"""Whether models fit together and fit their method, from configs and headers, before any tensor is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from ..checkpoint.quantized import format_settings, quantization
from ..core.errors import PlanError
from ..core.parameters import REQUIRED
from ..core.text import some_of
from ..methods.base import OutputTensor
from ..methods.registry import methods
from ..models.config_differences import config_differences
from ..models.reference import ModelRef
from ..models.source import SourceModel
from ..models.view import ModelView
from ..recipe.types import OutputSlice, SliceSource

_SHOWN = 20  # settings in a warning


@dataclass(frozen=True)
class Part:
    """The part of one source that a block reads: a layer, the embeddings, or the head.

    Attributes:
        source: The source, as the recipe has it.
        title: In words, for messages.
        shapes: Role -> shape of each tensor.
    """

    source: SliceSource
    title: str
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, source: SliceSource, model: SourceModel, title: str, names: Mapping[str, str]) -> Part:
        return cls(source, f"{title} of {source.model}", model.shapes(names))


def check_configs(models: Sequence[SourceModel], donor: SourceModel) -> list[str]:
    """Check that the weights of all models mean the same as the donor's, whose config the output takes.

    Returns:
        Warnings about models of another type, and about settings that change what layers compute.

    Raises:
        PlanError: another activation or layout of heads, which the shapes would not show.
    """
    warnings = []
    config, kind = donor.checkpoint.config, donor.view.model_type
    for model in (m for m in models if m is not donor):
        if model.view.model_type != kind:
            warnings.append(
                f"{model.ref} is of model_type {model.view.model_type}; the output is of {donor.ref}'s, {kind}"
            )
        _check_quantization(model, donor)
        own = model.checkpoint.config
        found = config_differences(config, donor.view.layers_path, own, model.view.layers_path)
        for difference in found:
            if difference.fatal:
                raise PlanError(
                    f"models do not match: {difference.key}",
                    where=model.ref.place.where,
                    expected=f"{difference.wanted}, as in {donor.ref}",
                    got=f"{difference.got} in {model.ref}",
                )
        texts = [str(difference) for difference in found]
        for name in (n for n in model.modules if n != model.main and n in donor.modules):
            paths = [m.modules[name].layers_path for m in (donor, model)]
            if all(paths) and paths[0] != donor.view.layers_path:
                texts += [f"{name} {d}" for d in config_differences(config, paths[0], own, paths[1])]
        if texts := list(dict.fromkeys(texts)):
            warnings.append(
                f"{model.ref} computes with other settings than {donor.ref}, whose settings the output takes:"
                f" {some_of(texts, _SHOWN)}"
            )
    return warnings


def _check_quantization(model: SourceModel, donor: SourceModel) -> None:
    """Codes that nobody can read here mean the same in two models only if their configs agree on the format."""
    if not (model.quantized or donor.quantized):
        return
    wanted, got = (format_settings(quantization(m.checkpoint.config) or {}) for m in (donor, model))
    if wanted != got:
        keys = [k for k in {**wanted, **got} if wanted.get(k) != got.get(k)]
        texts = [{k: v[k] for k in keys if k in v} or "not quantised so" for v in (wanted, got)]
        raise PlanError(
            "models do not match: they are quantised in other ways",
            where=model.ref.place.where,
            expected=f"{texts[0]}, as in {donor.ref}",
            got=f"{texts[1]} in {model.ref}",
        )


def check_same(parts: Sequence[Part], hint: str | None = None) -> None:
    """The sources of a block must have the same tensors, in the same shapes.

    Args:
        parts: The part of each source.
        hint: Advice for the message when they differ.

    Raises:
        PlanError: they differ.
    """
    for part in parts[1:]:
        if difference := _difference(part.shapes, parts[0].shapes):
            _mismatch(part, parts[0].title, difference, hint)


def check_like_donor(part: Part, donor: SourceModel, view: ModelView) -> None:
    """A layer must look like one of the donor's, or nobody could load the output.

    Args:
        part: The layer.
        donor: The donor.
        view: Its module that the layer goes to.

    Raises:
        PlanError: it looks like none.
    """
    kinds = donor.layer_kinds(view)
    if part.source.model == donor.ref or frozenset(part.shapes.items()) in kinds:
        return
    _mismatch(part, f"the layers of {donor.ref}", _difference(part.shapes, donor.shapes(view.layers[0])))


def base_source(slice_: OutputSlice, ref: ModelRef | None) -> int | None:
    """Which source is the base model, None without one; checks that the method gets the sources it needs.

    Args:
        slice_: The slice, its sources those of the block.
        ref: The base model that holds for the slice.

    Raises:
        RecipeError: the method needs a base model, or needs it among the sources, or takes another number of models.
    """
    method, name, sources = methods()[slice_.merge_method], slice_.merge_method, slice_.sources
    base = next((i for i, s in enumerate(sources) if s.model == ref), None)
    models = " or ".join(dict.fromkeys(str(s.model) for s in sources))
    if method.copies_one and len(sources) == 1:
        return base
    if base is None and ref is not None and method.base != "ignored":
        ref.place.fail(f"{name} starts from the base model, but no source of the slice is it", expected=models)
    if base is None and method.base == "required":
        nowhere = "no base_model in the slice or at the top level"
        slice_.place.fail(f"{name} needs a base model", expected=f"base_model: {models}", got=nowhere)
    low, high = method.others
    count = len(sources) - (base is not None and method.base != "ignored")
    if count < low or (high is not None and count > high):
        wanted = f"exactly {low}" if low == high else f"at least {low}" if count < low else f"at most {high}"
        beside = " in addition to the base model" if method.base != "ignored" else ""
        slice_.place.fail(f"{name} takes {wanted} {'model' if low == 1 else 'models'}{beside}, not {count}")
    return base


def check_given(slice_: OutputSlice, base: int | None, outputs: Sequence[OutputTensor]) -> None:
    """Parameters without a default must be set for every tensor, and every source, that they act on.

    Raises:
        RecipeError: one is not.
    """
    method = methods()[slice_.merge_method]
    copied = method.copies_one and len(slice_.sources) == 1
    needed = [] if copied else [p for p in method.parameters if p.default is REQUIRED]
    for output in outputs if needed else ():
        holders = [(slice_.place, output.parameters)]
        for i, source in enumerate(slice_.sources):
            if i != base or method.base == "ignored":  # a base model has no weight of its own
                holders.append((source.place, output.source_parameters[i]))
        for place, values in holders:
            for p in needed:
                if values.get(p.name) is REQUIRED:
                    place.fail(
                        f"{slice_.merge_method} needs {p.name}, which has no default",
                        expected=f"parameters: {{{p.name}: {p.expected}}}",
                        got=f"no value for {output.name}",
                    )


def _difference(own: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """The difference between two sets of tensors (role -> shape) in words; empty when there is none."""
    lacks, more = ([r for r in a if r not in b] for a, b in ((wanted, own), (own, wanted)))
    shapes = [f"{r} {list(own[r])}, not {list(wanted[r])}" for r in own if r in wanted and own[r] != wanted[r]]
    differences = (("lacks", lacks), ("has also", more), ("has", shapes))
    return "; ".join(f"{verb} {', '.join(roles[:5])}" for verb, roles in differences if roles)


def _mismatch(part: Part, like: str, difference: str, hint: str | None = None) -> NoReturn:
    raise PlanError(
        "models do not match",
        where=part.source.place.where,
        expected=f"the same tensors and shapes as {like}",
        got=f"{part.title} {difference}",
        hint=hint,
    )
