"""Blocks: the units of work, of resume and of memory that a plan is made of, before any tensor is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..align.parameters import AlignTo, plan_memory
from ..checkpoint.reader import TensorInfo
from ..core.units import ITEMSIZE
from ..methods.base import CopyOf, TensorTask, Zeros
from ..methods.registry import methods

CAST_BYTES = 64 << 20  # of a tensor that is only cast, this much is alive at once


@dataclass(frozen=True)
class BlockSource:
    """One source of a block: a model (index into `Plan.models`) and a layer of it, None outside of layers."""

    model: int
    layer: int | None


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor.

    Attributes:
        task: What the method gets to know about it.
        inputs: One stored tensor per source of its block.
        dtype: safetensors code it is written in.
        action: ``copy`` (file to file), ``cast`` (one source, in another dtype or derived), ``zeros``, or ``merge``.
        source: For copy and cast: which source.
    """

    task: TensorTask
    inputs: tuple[TensorInfo, ...]
    dtype: str
    action: str
    source: int | None = None

    @property
    def kept(self) -> bool:
        """Whether it is one source's tensor as it is, copied or derived."""
        if self.action != "cast":
            return self.action == "copy"
        taken = self.inputs[self.source]
        return taken.derived and taken.dtype == self.dtype

    @property
    def nbytes_read(self) -> int:
        if self.action == "zeros" or (self.action == "merge" and self.task.slot):  # those of slot 0 serve all slots
            return 0
        return self.inputs[self.source].nbytes if self.source is not None else sum(i.nbytes for i in self.inputs)


@dataclass(frozen=True)
class BlockPlan:
    """One unit of work, of resume and of memory.

    Attributes:
        index: Its place in `Plan.blocks`.
        title: ``layer 17``, ``embeddings``, ``final norm and head``.
        layers: Output layers it makes; empty for embeddings and head.
        method: The merge method's name.
        sources: In the recipe's order.
        base: Which source is the base model.
        tensors: In the order they are written.
        new: Whether its layers are new ones, to be trained.
        align: How its sources are aligned before the method sees them; None: they are not.
        module: Which module its layers are of; None where a recipe does not speak of
            modules, and for what is in none of them.
    """

    index: int
    title: str
    layers: tuple[int, ...]
    method: str
    sources: tuple[BlockSource, ...]
    base: int | None
    tensors: tuple[PlannedTensor, ...]
    new: bool = False
    align: AlignTo | None = None
    module: str | None = None

    def sources_of(self, slot: int) -> tuple[BlockSource, ...]:
        """What the layer of a slot comes from."""
        between = next(t.task.between for t in self.tensors if t.task.slot == slot)
        return self.sources if between is None else tuple(self.sources[i] for i in between)

    def joined(self, other: BlockPlan) -> BlockPlan:
        """This block, making the layers of another one, too."""
        layers, slot = self.layers + other.layers, len(self.layers)
        moved = tuple(replace(t, task=replace(t.task, slot=slot + t.task.slot)) for t in other.tensors)
        title = f"{len(layers)} layers, {layers[0]} to {layers[-1]}"
        return replace(self, title=title, layers=layers, tensors=self.tensors + moved)

    @property
    def computes(self) -> bool:
        return any(t.action in ("merge", "cast") for t in self.tensors)

    @property
    def kind(self) -> str:
        """``copy``, ``derived``, ``cast``, ``fused`` or ``merged``, for tables."""
        if any(t.action == "merge" for t in self.tensors):
            return "fused" if self.new else "merged"
        if self.new:
            return "copy, zeroed" if any(t.action == "zeros" for t in self.tensors) else "copy"
        actions = {t.action for t in self.tensors}
        if "cast" in actions:
            return "derived" if all(t.kept for t in self.tensors) else "cast"
        return "copy" if actions == {"copy"} else "copy, zeroed"

    @property
    def nbytes(self) -> int:
        """Of its outputs."""
        return sum(math.prod(t.task.shape) * ITEMSIZE[t.dtype] for t in self.tensors)

    def workspace(self, least: bool = False) -> int:
        """Estimated bytes alive at once while this block is made; ``least``: when plans make their buffers again."""
        merged = [t.task for t in self.tensors if t.action == "merge"]
        casts = (t.inputs[t.source].nbytes for t in self.tensors if t.action == "cast")
        widest = max((min(size, CAST_BYTES) * 3 for size in casts), default=0)
        if not merged:
            return widest
        method = methods()[self.method]
        made = method.least_workspace(merged) if least else method.workspace(merged)
        if self.align:
            made += plan_memory(self.align.values, [t.task for t in self.tensors])[least]
        return max(widest, made)

    def identity(self) -> list:
        """All that decides its bytes, as JSON data."""
        return [
            self.method,
            [[s.model, s.layer] for s in self.sources],
            self.base,
            *([self.module] if self.module else []),
            *([[self.align.target, dict(self.align.values)]] if self.align else []),
            [
                [
                    t.task.name,
                    t.action,
                    t.source,
                    t.dtype,
                    [i.name for i in t.inputs],
                    dict(t.task.parameters),
                    [dict(p) for p in t.task.source_parameters],
                    *([t.task.between] if t.task.between else []),
                ]
                for t in self.tensors
            ],
        ]


def in_output_order(blocks: Sequence[BlockPlan]) -> tuple[tuple[BlockPlan, PlannedTensor], ...]:
    """Every tensor with its block, layers by their numbers: those of one block need not be neighbours."""
    begins: dict[str | None, int] = {}  # module -> its first block of layers
    for i, block in enumerate(blocks):
        if block.layers:
            begins.setdefault(block.module, i)

    def place(output: tuple[int, BlockPlan, PlannedTensor]) -> tuple[int, int]:
        i, block, tensor = output
        return (begins[block.module], block.layers[tensor.task.slot]) if block.layers else (i, 0)

    outputs = ((i, b, t) for i, b in enumerate(blocks) for t in b.tensors)
    return tuple((b, t) for _, b, t in sorted(outputs, key=place))


def mark_repeats(blocks: Iterable[BlockPlan]) -> list[BlockPlan]:
    """A layer that stands a second time (solar, stack) is a new one."""
    seen, marked = set(), []
    for block in blocks:
        key = block.module, block.method, block.sources
        single = bool(block.layers) and not block.new and len(block.sources) == 1
        marked.append(replace(block, new=True) if single and key in seen else block)
        if single:
            seen.add(key)
    return marked


def join_learned(blocks: Iterable[BlockPlan]) -> list[BlockPlan]:
    """New layers that are learned from the same layers with the same parameters are made in one block."""
    joined: dict[object, BlockPlan] = {}
    for block in blocks:
        learned = block.module, block.method, block.sources, tuple(block.tensors[0].task.parameters.items())
        key = learned if methods()[block.method].learns else block.index
        joined[key] = joined[key].joined(block) if key in joined else block
    return [replace(block, index=i) for i, block in enumerate(joined.values())]


def action_of(
    task: TensorTask, method: str, inputs: tuple[TensorInfo, ...], dtype: str, align: AlignTo | None = None
) -> tuple[str, int | None]:
    """How an output tensor comes about, and from which source if from one alone."""
    origin = methods()[method].origin(task)
    if isinstance(origin, CopyOf) and align and align.moves(origin.source):
        return "merge", None
    if isinstance(origin, Zeros):
        return "zeros", None
    if isinstance(origin, CopyOf):
        taken = inputs[origin.source]
        return ("copy" if taken.dtype == dtype and not taken.derived else "cast"), origin.source
    return "merge", None
