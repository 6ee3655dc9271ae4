"""The layers that a new layer is made from, where its neighbours are of unlike kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from ..models.discovered import describe
from ..recipe.types import OutputSlice
from .block_builder import BlockBuilder

#: a layer's tensors: role and shape of each
Shape = frozenset[tuple[str, tuple[int, ...]]]


def describe_copied(
    builder: BlockBuilder,
    slice_: OutputSlice,
    setting: Callable[[OutputSlice, str], Any],
    pairs: Sequence[tuple[int, ...]],
) -> None:
    """Where new layers are copies and nobody described the family: describe as much as copies need, which tensors write
    to the residual stream.

    Args:
        builder, slice_, setting: As for `Parents`.
        pairs: The parents of each new layer, in the slice's sources; both in the only one.

    Raises:
        RecipeError: that was not found out.
    """
    copies = setting(slice_, "alignment") == "none" and setting(slice_, "t") in (0, 1)
    for i, ref in enumerate(source.model for source in slice_.sources) if copies else ():
        view = builder.view(ref)
        parents = {layer for pair in pairs for layer in (pair if len(slice_.sources) == 1 else (pair[i],))}
        if view.family is not None or (view.specs and all(view.specs[layer] for layer in parents)):
            continue
        found = describe(builder.models[builder.index[ref]].checkpoint.config, view, parents)
        if isinstance(found, str):
            slice_.place.fail(
                f"new layers of a {view.model_type!r} model cannot start as the identity: {found}",
                expected="a method or preset that makes no new layers of its own (passthrough, solar, stack)",
                got="a family that is not described (deus-merge methods lists those that are)",
            )
        builder.described[ref, builder.module] = found


class Parents:
    """The parents of new layers in the gaps of one slice.

    A new layer takes its kind from its upper neighbour B. A lower neighbour with other tensors cannot be fused with B;
    the nearest layer with B's tensors takes its place (``incompatible: nearest``), or none does and the new layer is a
    copy of B (``copy``). A preset that copies one neighbour needs no other parent.

    Args:
        builder: The blocks so far, and the models.
        slice_: The slice, with a single source.
        setting: Value of a parameter of the slice's method by name.
    """

    def __init__(self, builder: BlockBuilder, slice_: OutputSlice, setting: Callable[[OutputSlice, str], Any]):
        self._builder, self._slice = builder, slice_
        self._values = {name: setting(slice_, name) for name in ("alignment", "t", "incompatible", "zero_init")}
        self._replaced: list[str] = []
        self._check_identity()

    def of(self, pair: tuple[int, int]) -> tuple[int, int]:
        """The parents of a new layer between two neighbours: A and B.

        Raises:
            RecipeError: they are of unlike kinds, and ``incompatible`` is ``refuse``.
        """
        below, above = pair
        if self._shapes[below] == self._shapes[above]:
            return pair
        values = self._values
        if values["alignment"] == "none" and values["t"] in (0, 1):
            return (below, below) if values["t"] == 0 else (above, above)
        if values["incompatible"] == "refuse":
            kinds = self._builder.view(self._slice.sources[0].model).kinds or ("unlike",) * (above + 1)
            self._slice.place.fail(
                f"layers {below} and {above} are of unlike kinds and cannot be fused",
                expected="incompatible: nearest, which fuses the nearest layer of the upper one's kind, or copy",
                got=f"{kinds[below]} below {kinds[above]}",
            )
        parent = self._nearest(above) if values["incompatible"] == "nearest" else above
        self._replaced.append(f"{parent} for {below} below {above}")
        return parent, above

    def learned_from(self, pair: tuple[int, int]) -> tuple[Sequence[int], tuple[int, int]]:
        """For a method that learns from layers: those of B's kind, and which of them are the neighbours."""
        below, above = pair
        alike = [i for i, shapes in enumerate(self._shapes) if shapes == self._shapes[above]]
        parent = below if below in alike else self._nearest(above)
        return alike, (alike.index(parent), alike.index(above))

    def report(self) -> None:
        """Warn of the neighbours that another layer was taken for."""
        if self._replaced:
            shown = ", ".join(self._replaced[:5]) + (
                f" and {len(self._replaced) - 5} more" if self._replaced[5:] else ""
            )
            self._builder.warnings.append(
                f"neighbours of unlike kinds cannot be fused; another layer is taken instead: {shown}"
            )

    def _nearest(self, layer: int) -> int:
        """The nearest layer of the same kind, the lower one of two; the layer itself where there is none."""
        alike = [i for i, s in enumerate(self._shapes) if s == self._shapes[layer] and i != layer]
        return min(alike, key=lambda i: (abs(i - layer), i), default=layer)

    @cached_property
    def _shapes(self) -> list[Shape]:
        source = self._slice.sources[0]
        model = self._builder.model(source)
        return [frozenset(model.shapes(layer).items()) for layer in self._builder.view(source.model).layers]

    def _check_identity(self) -> None:
        family = self._builder.view(self._slice.sources[0].model).family
        if family and family.no_identity and self._values["zero_init"]:
            others = "zero_init: false, or a preset that does not zero outputs (average, solar, stack)"
            fixed = self._builder.fixed_depth(self._slice.sources[0].model)
            self._slice.place.fail(
                f"a new layer of {family.name} cannot start as the identity: {family.no_identity}",
                expected=None if fixed else others,
                hint=fixed,
            )
