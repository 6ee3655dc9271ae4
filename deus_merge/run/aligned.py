"""Blocks whose sources are aligned to one of them before the merge method sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ..align import align_layer
from ..align.memory import solver_memory
from ..align.parameters import align_options
from ..core.tensors import Action, OutputChunk
from ..methods.base import Block, MergeMethod, SourceLayer
from ..plan.blocks import AlignTo

if TYPE_CHECKING:
    import torch


class AlignedBlock:
    """A block whose sources were aligned to one of them (`methods.base.Block`). Tensors are aligned as they are read,
    role by role, and each can be read once."""

    def __init__(self, block: Block, align: AlignTo):
        self.outputs, self.base, self.memory, self.generator = block.outputs, block.base, block.memory, block.generator
        self._block, self._align = block, align
        self._specs = {output.role: output.spec for output in self.outputs}
        self._aligning: dict[int, Iterator[OutputChunk]] = {}
        self._waiting: dict[tuple[int, str], torch.Tensor] = {}
        self.diagnostics: list[OutputChunk] = []

    def read(self, role: str, source: int) -> torch.Tensor:
        spec = self._specs[role]
        if not self._align.moves(source) or (spec and spec.opaque):
            return self._block.read(role, source)
        if source not in self._aligning:
            memory = solver_memory(self._align.values, self.outputs, self.memory)
            options = align_options(self._align.values, self.outputs[0].heads, memory)
            sides = SourceLayer(self._block, source), SourceLayer(self._block, self._align.target)
            specs = [spec for spec in self._specs.values() if spec is not None and not spec.opaque]
            self._aligning[source] = align_layer(*sides, specs, options, {o.role: o.shape for o in self.outputs})
        while (source, role) not in self._waiting:
            chunk = next(self._aligning[source])
            if chunk.values is not None:
                self._waiting[source, chunk.role] = chunk.values
            if chunk.diagnostics is not None:
                diagnostics = replace(chunk.diagnostics, source=source)
                self.diagnostics.append(OutputChunk(chunk.role, None, diagnostics=diagnostics))
        return self._waiting.pop((source, role))

    def flat(self, role: str, source: int) -> torch.Tensor:
        return self.read(role, source).reshape(-1)


def merge_aligned(method: MergeMethod, block: Block, align: AlignTo) -> Iterator[OutputChunk]:
    """`MergeMethod.merge` of a block whose sources are aligned first, and the outputs that are only aligned."""
    aligned = AlignedBlock(block, align)
    for output in block.outputs:
        if output.action is Action.ALIGN and output.source is not None:
            yield OutputChunk(output.role, aligned.read(output.role, output.source), output.slot)
    yield from method.merge(aligned)
    yield from aligned.diagnostics
