"""Estimates of the memory that the alignment of two layers takes, before any tensor is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from ..models.spec import RESIDUAL, Heads, TensorSpec
from ..ot.registry import solver
from ..ot.solver import OTSolver
from .options import default_solver
from .packing import part_shapes


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
    width = 8 if values["compute_dtype"] == "float64" else 4
    stored = chosen_solver(values).stored_bytes(width)
    return _estimate(values["alignment"], width, stored, specs, shapes, heads)


@lru_cache(maxsize=64)
def _estimate(
    alignment: str,
    width: int,
    stored: int,
    specs: tuple[TensorSpec, ...],
    shapes: tuple[tuple[int, ...], ...],
    heads: Heads | None,
) -> Memory:
    """Layers of one kind have the same estimate.

    Args:
        alignment, heads: As in `AlignOptions`.
        width: Bytes of a number.
        stored: `OTSolver.stored_bytes` of the solver.
        specs, shapes: The tensors.
    """
    parts = part_shapes(specs, dict(zip((s.role for s in specs), shapes, strict=True)), heads)
    matrices = [(spec, shape) for spec, shape in parts if len(shape) == 2]
    if not matrices:
        return Memory(0, 0)
    packed = width * max((math.prod(n) for s, n in zip(specs, shapes, strict=True) if s.layout), default=0)
    largest = max(math.prod(shape) for _, shape in matrices)
    if alignment == "none":
        return Memory(packed + 5 * width * largest, packed + 5 * width * largest)
    if alignment == "transport_flow":
        flow = width * min(max(shape) for _, shape in matrices) ** 2  # the plan of the residual stream stays in memory
        count = max(shape[0] for spec, shape in matrices if spec.out_space != "experts")
        minimum = packed + 5 * width * largest + flow + stored * count**2
        return Memory(max(minimum, packed + 5 * width * largest + flow + 2 * width * count**2), minimum)
    return _symmetry(width, stored, matrices, packed)


def _symmetry(width: int, stored: int, matrices: Sequence[tuple[TensorSpec, tuple[int, ...]]], packed: int) -> Memory:
    """As `_estimate`: neurons, of one MLP or expert after the other, and all heads."""
    largest = max(math.prod(shape) for _, shape in matrices)
    spaces: dict[str, list[tuple[int, int]]] = {}  # of neurons -> (their number, elements) of each weight
    others = 0
    for spec, shape in matrices:
        own = [(s, n) for s, n in ((spec.in_space, shape[1]), (spec.out_space, shape[0])) if s and s[:7] == "neurons"]
        for space, count in own:
            spaces.setdefault(space, []).append((count, math.prod(shape)))
        others += 0 if own else math.prod(shape)
    scores = 4 * width * max((max(shape) ** 2 for spec, shape in matrices if _reads_heads(spec)), default=0)
    full = minimum = max(2 * width * others + scores, 5 * width * largest)
    for weights in spaces.values():
        features, count = 2 * width * sum(n for _, n in weights), max(n for n, _ in weights)
        least = max(features + 2 * width * largest, features + width * largest + stored * count**2)
        minimum = max(minimum, least)
        full = max(full, least, features + width * largest + 2 * width * count**2)
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
