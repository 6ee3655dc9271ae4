"""Estimates of the memory that the alignment of two layers takes, before any tensor is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from ..core.tensors import StoredTensor
from ..core.units import ITEMSIZE
from ..models.spec import RESIDUAL, Heads, TensorSpec
from ..ot.points import PANEL_ROWS
from ..ot.products import KEPT
from ..ot.registry import solver
from ..ot.solver import OTSolver
from .fusion import HELD_POINTS
from .heads import ELEMENTS
from .options import default_solver
from .packing import part_shapes

_EDGES = 3000  # bytes a row for the edges of a sparse matching


class PlannedRole(Protocol):
    """The properties of an output tensor that checks and estimates of memory use."""

    @property
    def role(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def spec(self) -> TensorSpec | None: ...

    @property
    def heads(self) -> Heads | None: ...

    @property
    def inputs(self) -> Sequence[StoredTensor]: ...


@dataclass(frozen=True)
class Memory:
    """An estimate in bytes.

    Attributes:
        full: With every buffer in memory.
        minimum: With n x n buffers computed again in row blocks.
    """

    full: int
    minimum: int


def alignment_memory(values: Mapping[str, Any], outputs: Sequence[PlannedRole]) -> Memory:
    """The memory in bytes that the alignment of two layers takes.

    Args:
        values: Of the parameters of alignment, by name.
        outputs: The tensors of a layer that are computed.
    """
    specs = tuple(o.spec for o in outputs if o.spec is not None)
    if len(specs) < len(outputs):
        return Memory(0, 0)
    shapes = tuple(tuple(o.shape) for o in outputs)
    heads = outputs[0].heads if outputs else None
    chosen, width = chosen_solver(values), 8 if values["compute_dtype"] == "float64" else 4
    numbers = _Numbers(width, max((ITEMSIZE[i.dtype] for o in outputs for i in o.inputs), default=width))
    return _estimate(values["alignment"], numbers, chosen, values.get("restore_norm") != "tensor", specs, shapes, heads)


@dataclass(frozen=True)
class _Numbers:
    """Bytes of a number: in the arithmetic, and as it is stored."""

    width: int
    stored: int


@lru_cache(maxsize=64)
def _estimate(
    alignment: str,
    numbers: _Numbers,
    chosen: OTSolver,
    by_rows: bool,
    specs: tuple[TensorSpec, ...],
    shapes: tuple[tuple[int, ...], ...],
    heads: Heads | None,
) -> Memory:
    """Layers of one kind have the same estimate.

    Args:
        alignment, heads: As in `AlignOptions`.
        numbers: Sizes.
        chosen: The solver.
        by_rows: Whether weights of neurons can be fused some rows at a time.
        specs, shapes: The tensors.
    """
    parts = part_shapes(specs, dict(zip((s.role for s in specs), shapes, strict=True)), heads)
    matrices = [(spec, shape) for spec, shape in parts if len(shape) == 2]
    if not matrices:
        return Memory(0, 0)
    width = numbers.width
    packed = width * max((math.prod(n) for s, n in zip(specs, shapes, strict=True) if s.layout), default=0)
    largest = max(math.prod(shape) for _, shape in matrices)
    if alignment == "none":
        return Memory(packed + 5 * width * largest, packed + 5 * width * largest)
    if alignment == "transport_flow":
        flow = width * min(max(shape) for _, shape in matrices) ** 2  # the plan of the residual stream stays in memory
        count = max(shape[0] for spec, shape in matrices if spec.out_space != "experts")
        minimum = packed + 5 * width * largest + flow + chosen.stored_bytes(width) * count**2
        return Memory(max(minimum, packed + 5 * width * largest + flow + 2 * width * count**2), minimum)
    return _symmetry(numbers, chosen, matrices, packed, by_rows and not packed)


def _symmetry(
    numbers: _Numbers,
    chosen: OTSolver,
    matrices: Sequence[tuple[TensorSpec, tuple[int, ...]]],
    packed: int,
    by_rows: bool,
) -> Memory:
    """As `_estimate`: neurons, of one MLP or expert after the other, and all heads."""
    width = numbers.width
    spaces: dict[str, list[tuple[TensorSpec, int, int]]] = {}  # of neurons -> each weight, their number, its elements
    others = [0]
    for spec, shape in matrices:
        own = [(s, n) for s, n in ((spec.in_space, shape[1]), (spec.out_space, shape[0])) if s and s[:7] == "neurons"]
        for space, count in own:
            spaces.setdefault(space, []).append((spec, count, math.prod(shape)))
        if not own:
            others.append(math.prod(shape))
    scores = max((max(shape) ** 2 for spec, shape in matrices if _reads_heads(spec)), default=0)
    moved = max(others) if by_rows and chosen.lazy_points else max(math.prod(shape) for _, shape in matrices)
    full = minimum = max(2 * width * sum(others) + 10 * width * min(scores, ELEMENTS), 5 * width * moved)
    for space, weights in spaces.items():
        features, count = sum(n for _, _, n in weights), max(n for _, n, _ in weights)
        matrix, stored = width * count**2, chosen.stored_bytes(width) * count**2
        if chosen.lazy_points:
            turned = numbers.stored * sum(n for spec, _, n in weights if spec.in_space == space)
            panel = width * min(PANEL_ROWS, count) * (count + 2 * features // count)
            panel *= 1 if width * features <= KEPT else 2
            least = 2 * turned + panel + min(width * features, KEPT) + _EDGES * count
            more = 0 if by_rows else 3 * width * max(n for _, _, n in weights)
            points = 2 * width * features
            minimum = max(minimum, least, turned + more)
            full = max(full, minimum, least + matrix + (points if points <= HELD_POINTS else 0))
        else:
            held, largest = 2 * width * features, width * max(n for _, _, n in weights)
            least = held + max(2 * largest, largest + stored)
            minimum, full = max(minimum, least), max(full, least, held + largest + 2 * matrix)
    return Memory(packed + full, packed + minimum)


def _reads_heads(spec: TensorSpec) -> bool:
    return (spec.in_space, spec.out_space) == ("value_heads", RESIDUAL)


def solver_memory(values: Mapping[str, Any], outputs: Sequence[PlannedRole], memory: int | None) -> int | None:
    """The rest of a block's memory in bytes, for n x n buffers."""
    return None if memory is None else max(0, memory - alignment_memory(values, outputs).minimum)


def chosen_solver(values: Mapping[str, Any]) -> OTSolver:
    """The solver that the values name."""
    name = values["solver"]
    return solver(default_solver(values["alignment"]) if name == "auto" else name)
