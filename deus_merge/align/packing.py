"""Stored tensors that consist of several matrices: taken apart before an alignment, packed again after it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..core.tensors import OutputChunk
from ..core.text import some_of
from ..models.extents import Extents
from ..models.spec import RESIDUAL, Heads, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

_DOWN = re.compile(r"(experts\.\d+\.)down")


class Packing:
    """The matrices of a layer, and the stored tensors that they lie in.

    Args:
        specs: The stored tensors, in the order of alignment.
        shapes: Role -> shape of those with a layout.
        heads: The layer's attention heads.

    Attributes:
        specs: The matrices and vectors that alignment sees, in order.
        part: The same by role.
        owner: Part -> the role of the stored tensor that it lies in.
        stored: The stored tensors by role.
    """

    def __init__(self, specs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]], heads: Heads | None):
        self.heads, self._shapes = heads, shapes
        specs = fitted(specs, shapes)
        self._parts = {s.role: s.layout.specs(shapes[s.role]) if s.layout else (s,) for s in specs}
        self.stored = {s.role: s for s in specs}
        self.owner = {part.role: role for role, parts in self._parts.items() for part in parts}
        self.specs = tuple(part for spec in specs for part in self._parts[spec.role])
        self.part = {part.role: part for part in self.specs}

    def roles(self, stored: Iterable[str]) -> frozenset[str]:
        """The parts of these stored tensors."""
        return frozenset(part.role for role in stored for part in self._parts.get(role, ()))

    def unpack(self, layer: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A layer by the roles of its parts. A stored tensor is looked up when its first part is."""
        if not any(spec.layout for spec in self.stored.values()):
            return layer
        return _Parts(layer, self)

    def pack(self, chunks: Iterable[OutputChunk]) -> Iterator[OutputChunk]:
        """Stored tensors from whole parts, each as soon as its last part is there. Diagnostics go on with the name of
        the stored tensor's role."""
        whole: dict[tuple[str, int], tuple[Tensor, dict[str, Tensor]]] = {}  # the tensor, and its parts to come
        for chunk in chunks:
            role = self.owner.get(chunk.role, chunk.role)
            layout = self.stored[role].layout if role in self.stored else None
            if layout is None:
                yield chunk
                continue
            if chunk.diagnostics is not None:
                yield OutputChunk(role, None, chunk.slot, diagnostics=chunk.diagnostics)
            if chunk.values is None:
                continue
            key = role, chunk.slot
            if key not in whole:
                stored = chunk.values.new_empty(self._shapes[role])
                whole[key] = stored, dict(layout.split(stored, self.heads))
            stored, to_come = whole[key]
            view = to_come.pop(chunk.role)
            view.copy_(chunk.values.reshape(view.shape))
            if not to_come:
                del whole[key]
                yield OutputChunk(role, stored, chunk.slot)


def fitted(specs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> Sequence[TensorSpec]:
    """The specs with the layouts that their shapes show."""
    norms = (s.role for s in specs if s.in_space is None and s.out_space == RESIDUAL and s.layout is None)
    width = next((shapes[role][0] for role in norms if len(shapes.get(role, ())) == 1), None)
    return [replace(s, layout=s.layout.fitted(shapes, width)) if s.layout else s for s in specs]


def layout_problem(
    specs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]], heads: Heads | None
) -> str | None:
    """Why a stored tensor cannot consist of what its layout says, or experts do not fit together; None if all do."""
    found = {spec.role: tuple(shapes[spec.role]) for spec in specs if spec.layout is None and spec.role in shapes}
    for spec in (spec for spec in fitted(specs, shapes) if spec.layout is not None):
        assert spec.layout is not None
        try:
            found |= {role: part.shape for role, part in spec.layout.split(Extents(shapes[spec.role]), heads).items()}
        except (RuntimeError, ValueError, IndexError, AssertionError):
            parts = some_of(part.role for part in spec.layout.specs(shapes[spec.role]))
            of = f"{heads.query} query and {heads.key_value} key-value heads of {heads.size}" if heads else "the heads"
            return f"{spec.role} of shape {list(shapes[spec.role])} does not consist of {parts} for {of} of config.json"
    return _expert_problem(found)


def _expert_problem(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why the matrices of an expert cannot follow each other: up and gate are (f, d), down is (d, f)."""
    for role, shape in shapes.items():
        if not (match := _DOWN.fullmatch(role)):
            continue
        for other in (f"{match[1]}up", f"{match[1]}gate"):
            if other in shapes and shapes[other] != shape[::-1]:
                return f"{role} of shape {list(shape)} does not fit {other} of shape {list(shapes[other])}"
    return None


def part_shapes(
    specs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]], heads: Heads | None
) -> list[tuple[TensorSpec, tuple[int, ...]]]:
    """The matrices and vectors that alignment will see, and their shapes; no tensor is read."""
    found: list[tuple[TensorSpec, tuple[int, ...]]] = []
    for spec in fitted(specs, shapes):
        if spec.layout is None:
            found.append((spec, shapes[spec.role]))
            continue
        views = spec.layout.split(Extents(shapes[spec.role]), heads)
        for part in spec.layout.specs(shapes[spec.role]):
            shape = tuple(views[part.role].shape)
            rows = math.prod(shape) if part.in_space is None else math.prod(shape[:-1])
            found.append((part, (rows,) if part.in_space is None else (rows, shape[-1])))
    return found


class _Parts(Mapping[str, "Tensor"]):
    """A layer whose stored tensors are taken apart. A part is a matrix (rows, columns) or a vector (rows,)."""

    def __init__(self, layer: Mapping[str, Tensor], packing: Packing):
        self._layer, self._packing = layer, packing
        self._views: dict[str, Mapping[str, Tensor]] = {}  # stored tensor -> its parts

    def __getitem__(self, role: str) -> Tensor:
        packing = self._packing
        owner, spec = packing.owner[role], packing.part[role]
        layout = packing.stored[owner].layout
        if layout is None:
            return self._layer[owner]
        if owner not in self._views:
            self._views[owner] = layout.split(self._layer[owner], packing.heads)
        view = self._views[owner][role]
        return view.flatten() if spec.in_space is None else view.flatten(0, -2)

    def __iter__(self) -> Iterator[str]:
        return iter(self._packing.owner)

    def __len__(self) -> int:
        return len(self._packing.owner)
