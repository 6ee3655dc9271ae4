"""Blocks: the units of work, of resume and of memory that a plan is made of, before any tensor is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..align.memory import alignment_memory
from ..checkpoint.layout import TensorEntry
from ..core.tensors import UNCHANGED, Action
from ..methods.base import OutputTensor
from ..methods.registry import methods

CAST_BYTES = 64 << 20  # of a tensor that is only cast, this much is alive at once


@dataclass(frozen=True)
class BlockSource:
    """One source of a block: a model (index into `Plan.models`) and a layer of it, None outside of layers."""

    model: int
    layer: int | None


@dataclass(frozen=True)
class AlignTo:
    """What ``align:`` of a slice asks for.

    Attributes:
        target: The source that the others are aligned to.
        values: Values of `align.parameters.PARAMETERS`, by name.
    """

    target: int
    values: Mapping[str, Any]

    def moves(self, source: int) -> bool:
        """Whether tensors of this source change."""
        return source != self.target and self.values["alignment"] != "none"


@dataclass(frozen=True)
class BlockPlan:
    """One unit of work, of resume and of memory.

    Attributes:
        index: Its place in `Plan.blocks`.
        title: ``layer 17``, ``embeddings``, ``final norm and head``, ``layer 17, up``.
        layers: Output layers that its tensors are of; empty for embeddings and head.
        method: The merge method's name.
        sources: In the recipe's order.
        base: Which source is the base model.
        outputs: In the order they are written.
        new: Whether its layers are new ones, to be trained.
        align: How its sources are aligned before the method sees them; None: they are not.
        module: Which module its layers are of; None where a recipe does not speak of modules, and for tensors that are
            in none of them.
        part_of: Where it makes one role of its layers: their title, ``layer 17``. None: it makes all of their tensors.
    """

    index: int
    title: str
    layers: tuple[int, ...]
    method: str
    sources: tuple[BlockSource, ...]
    base: int | None
    outputs: tuple[OutputTensor, ...]
    new: bool = False
    align: AlignTo | None = None
    module: str | None = None
    part_of: str | None = None

    def sources_of(self, slot: int) -> tuple[BlockSource, ...]:
        """The sources of the layer of a slot."""
        between = next(o.between for o in self.outputs if o.slot == slot)
        return self.sources if between is None else tuple(self.sources[i] for i in between)

    def source_of(self, output: OutputTensor) -> BlockSource:
        """The source of an action on one source."""
        assert output.source is not None, f"{output.name}: {output.action} has no single source"
        return self.sources[output.source]

    def joined(self, other: BlockPlan) -> BlockPlan:
        """This block, making the layers of another one, too."""
        layers, slot = self.layers + other.layers, len(self.layers)
        moved = tuple(replace(o, slot=slot + o.slot) for o in other.outputs)
        title = f"{len(layers)} layers, {layers[0]} to {layers[-1]}"
        title = f"{self.module}, {title}" if self.module else title
        return replace(self, title=title, layers=layers, outputs=self.outputs + moved)

    def roles(self) -> list[BlockPlan]:
        """This block as blocks that make one role of its layers each."""
        found: dict[str, list[OutputTensor]] = {}
        for output in self.outputs:
            found.setdefault(output.role, []).append(output)
        return [
            replace(self, title=f"{self.title}, {role}", outputs=tuple(outputs), part_of=self.title)
            for role, outputs in found.items()
        ]

    @cached_property
    def by_role(self) -> Mapping[tuple[str, int], OutputTensor]:
        """Its outputs by role and slot."""
        return {(o.role, o.slot): o for o in self.outputs}

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        """How its outputs come about, each action once, in the order of `Action`."""
        found = {o.action for o in self.outputs}
        return tuple(action for action in Action if action in found)

    @property
    def how(self) -> str:
        """Its actions in words, for tables."""
        return " + ".join(self.actions)

    @property
    def unchanged(self) -> bool:
        """Whether all its outputs are tensors of single sources, rounding to another dtype apart."""
        return set(self.actions) <= UNCHANGED

    @property
    def merges(self) -> bool:
        """Whether its method, or an alignment, computes anything."""
        return Action.COMPUTE in self.actions or Action.ALIGN in self.actions

    @property
    def computes(self) -> bool:
        """Whether it needs more than copies from file to file and zeros."""
        quantizes = any(o.quantization and o.action is not Action.COPY for o in self.outputs)
        return quantizes or not set(self.actions) <= {Action.COPY, Action.ZEROS}

    @property
    def nbytes(self) -> int:
        """Total size of the outputs in bytes."""
        return sum(o.nbytes for o in self.outputs)

    def workspace(self, minimum: bool = False) -> int:
        """Estimated bytes alive at once while this block is computed.

        Args:
            minimum: With buffers computed again in row blocks instead of kept.
        """
        computed = [o for o in self.outputs if o.action in (Action.COMPUTE, Action.ALIGN)]
        read = (o.stored.nbytes for o in self.outputs if o.action in (Action.CAST, Action.DERIVE))
        widest = max((min(size, CAST_BYTES) * 3 for size in read), default=0)
        if not computed:
            return widest
        method = methods()[self.method]
        needed = method.minimum_workspace(computed) if minimum else method.workspace(computed)
        if self.align:
            memory = alignment_memory(self.align.values, self.outputs)
            needed += memory.minimum if minimum else memory.full
        return max(widest, needed)

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
                    o.name,
                    o.action,
                    o.source,
                    o.dtype,
                    [i.name for i in o.inputs],
                    dict(o.parameters),
                    [dict(p) for p in o.source_parameters],
                    *([o.between] if o.between else []),
                    *([[o.quantization.format, dict(o.quantization.settings)]] if o.quantization else []),
                ]
                for o in self.outputs
            ],
        ]


def actions_of(blocks: Iterable[BlockPlan]) -> tuple[Action, ...]:
    """How the outputs of blocks come about, as `BlockPlan.actions`."""
    found = {action for block in blocks for action in block.actions}
    return tuple(action for action in Action if action in found)


def by_layer(blocks: Iterable[BlockPlan]) -> dict[int, list[BlockPlan]]:
    """The blocks that make each layer of a stack, by its number, the lowest first."""
    found: dict[int, list[BlockPlan]] = {}
    for block in blocks:
        for layer in block.layers:
            found.setdefault(layer, []).append(block)
    return dict(sorted(found.items()))


def are_identities(blocks: Sequence[BlockPlan]) -> bool:
    """Whether all layers of these blocks add nothing to the residual stream, and scale nothing."""
    layers = {(block.module, layer) for block in blocks for layer in block.layers}
    zeroed = set()
    for block, output in ((b, o) for b in blocks for o in b.outputs):
        spec, action = output.spec, output.action
        if spec and (spec.writes_residual and action is not Action.ZEROS or spec.one and action is not Action.ONES):
            return False
        if spec and spec.writes_residual:
            zeroed.add((block.module, block.layers[output.slot]))
    return zeroed == layers


def in_output_order(blocks: Sequence[BlockPlan]) -> tuple[tuple[BlockPlan, OutputTensor], ...]:
    """Every tensor with its block, layers by their numbers: those of one block need not be neighbours."""
    first: dict[str | None, int] = {}  # module -> its first block of layers
    for i, block in enumerate(blocks):
        if block.layers:
            first.setdefault(block.module, i)

    def place(item: tuple[int, BlockPlan, OutputTensor]) -> tuple[int, int]:
        i, block, output = item
        return (first[block.module], block.layers[output.slot]) if block.layers else (i, 0)

    outputs = ((i, b, o) for i, b in enumerate(blocks) for o in b.outputs)
    return tuple((b, o) for _, b, o in sorted(outputs, key=place))


def file_groups(blocks: Sequence[BlockPlan]) -> list[list[TensorEntry]]:
    """The tensors of each block, blocks in the order of their first layer.

    A file belongs to whole blocks, so any worker that has made these can write it. Layers that are made together, role
    by role (learned ones), are together in the files, too, in the same order.
    """
    groups: dict[int, list[TensorEntry]] = {}
    for block, output in in_output_order(blocks):
        entries = (TensorEntry(tensor.name, tensor.dtype, tensor.shape) for tensor in output.written)
        groups.setdefault(block.index, []).extend(entries)
    return list(groups.values())


def mark_repeats(blocks: Iterable[BlockPlan]) -> list[BlockPlan]:
    """A layer that is there a second time (solar, stack) is a new one."""
    seen, marked = set(), []
    for block in blocks:
        key = block.module, block.method, block.sources
        single = bool(block.layers) and not block.new and len(block.sources) == 1
        marked.append(replace(block, new=True) if single and key in seen else block)
        if single:
            seen.add(key)
    return marked


def learned_by_role(blocks: Iterable[BlockPlan]) -> list[BlockPlan]:
    """New layers that are learned from the same layers with the same parameters are made together, and each of their
    roles is a block: it is learned independently of the others."""
    joined: dict[object, BlockPlan] = {}
    for block in blocks:
        learned = block.module, block.method, block.sources, tuple(block.outputs[0].parameters.items())
        key = learned if methods()[block.method].learns else block.index
        joined[key] = joined[key].joined(block) if key in joined else block
    parts = (part for b in joined.values() for part in (b.roles() if methods()[b.method].learns else (b,)))
    return [replace(block, index=i) for i, block in enumerate(parts)]
