"""Whether models fit together, told by configs and headers before any tensor is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from .config import heads
from .errors import PlanError
from .plan import SourceModel
from .recipe import SliceSource


@dataclass(frozen=True)
class Part:
    """What a block takes from one source: a layer, the embeddings, or the head.

    Attributes:
        source: The source, as the recipe has it.
        what: In words, for messages.
        shapes: Role -> shape of each tensor.
    """

    source: SliceSource
    what: str
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, source: SliceSource, model: SourceModel, what: str, names: Mapping[str, str]) -> Part:
        return cls(source, f"{what} of {source.model}", _shapes(model, names))


def check_heads(models: Sequence[SourceModel], donor: SourceModel) -> list[str]:
    """What the donor's config.json says of heads must be true of every model's layers.

    Returns:
        Warnings about models of another type.

    Raises:
        PlanError: another number of heads, which the shapes would not show.
    """
    wanted = heads(donor.checkpoint.config, donor.view)
    for model in models:
        got = heads(model.checkpoint.config, model.view)
        for key in (k for k in wanted if got[k] != wanted[k]):
            raise PlanError(
                f"models do not match: {key}",
                where=model.ref.place.where,
                expected=f"{wanted[key]}, as in {donor.ref}",
                got=f"{got[key]} in {model.ref}",
            )
    kind = donor.view.model_type
    others = [m for m in models if m.view.model_type != kind]
    return [f"{m.ref} is of model_type {m.view.model_type}; the output is of {donor.ref}'s, {kind}" for m in others]


def check_same(parts: Sequence[Part]) -> None:
    """The sources of a block must have the same tensors, in the same shapes.

    Raises:
        PlanError: they have not.
    """
    for part in parts[1:]:
        if difference := _difference(part.shapes, parts[0].shapes):
            _mismatch(part, parts[0].what, difference)


def check_like_donor(part: Part, donor: SourceModel) -> None:
    """A layer must look like one of the donor's, or nobody could load the output.

    Raises:
        PlanError: it looks like none.
    """
    if part.source.model == donor.ref or any(part.shapes == _shapes(donor, layer) for layer in donor.view.layers):
        return
    _mismatch(part, f"the layers of {donor.ref}", _difference(part.shapes, _shapes(donor, donor.view.layers[0])))


def _shapes(model: SourceModel, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    return {role: model.checkpoint.tensors[name].shape for role, name in names.items()}


def _difference(own: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """What sets tensors (role -> shape) apart from others, in words; empty when nothing does."""
    lacks, more = ([r for r in a if r not in b] for a, b in ((wanted, own), (own, wanted)))
    shapes = [f"{r} {list(own[r])}, not {list(wanted[r])}" for r in own if r in wanted and own[r] != wanted[r]]
    told = (("lacks", lacks), ("has also", more), ("has", shapes))
    return "; ".join(f"{verb} {', '.join(what[:5])}" for verb, what in told if what)


def _mismatch(part: Part, like: str, difference: str) -> NoReturn:
    raise PlanError(
        "models do not match",
        where=part.source.place.where,
        expected=f"the same tensors and shapes as {like}",
        got=f"{part.what} {difference}",
    )
