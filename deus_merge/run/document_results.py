"""The results of a recipe's documents in one run: computed as far as they are needed, never written to the disk."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.tensor_source import FileStamp, TensorSource
from ..core.errors import DeusMergeError
from ..core.tensors import CONSTANT, Action, StoredTensor
from ..core.units import torch_dtype
from ..methods.registry import methods
from ..plan.documents import PlannedResult, inputs_read
from ..plan.types import Plan
from .compute import BlockComputer, Computed
from .times import COMPUTED, during

if TYPE_CHECKING:
    import torch


class DocumentResult:
    """A document's result in one run (`TensorSource`): its blocks are computed when a tensor of theirs is read.

    A block is computed as far as its method must go for that tensor, a learned one to its end. The values have the
    bytes that a file would have; the few blocks that were read last stay in memory.

    Args:
        planned: The result as the plan describes it.
        computer: Computes the document's blocks.
        cached_blocks: How many blocks stay in memory.
    """

    def __init__(self, planned: PlannedResult, computer: BlockComputer, cached_blocks: int):
        self.where: object = planned.where
        self.folders: tuple[Path, ...] = planned.folders
        self.files: tuple[Path, ...] = planned.files
        self.side_files: Mapping[str, bytes | Path] = planned.side_files
        self.provenance: Mapping[str, object] = planned.provenance
        self.config: dict = planned.config
        self.tensors: Mapping[str, StoredTensor] = planned.tensors
        self.fingerprint: str = planned.fingerprint
        self._planned, self._computer, self._cached_blocks = planned, computer, cached_blocks
        self._blocks: OrderedDict[int, _PartialBlock] = OrderedDict()
        self._diagnostics: list[dict] = []

    def read(self, name: str) -> torch.Tensor:
        block, output = self._planned.planned(name)
        if output.action is Action.COPY:
            return self._computer.source(block, output.source).read(output.stored.name)
        return self._computed(name).clone()

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        block, output = self._planned.planned(name)
        if output.action is Action.COPY:
            return self._computer.source(block, output.source).slice(output.stored.name, start, stop)
        return self._computed(name)[start:stop].clone()

    def prefetch(self, names: Iterable[str]) -> None:
        for block, output in map(self._planned.planned, names):
            if output.action is Action.COPY:
                self._computer.source(block, output.source).prefetch([output.stored.name])
            for i in inputs_read(output):
                self._computer.source(block, i).prefetch([output.inputs[i].name])

    def stamp(self) -> list[FileStamp]:
        return self._planned.stamp()

    def root(self, name: str) -> tuple[TensorSource, str]:
        return self._planned.root(name)

    def bound(self, results: Mapping[str, TensorSource]) -> TensorSource:
        return self

    def workspace(self, name: str, minimum: bool = False) -> int:
        return self._planned.workspace(name, minimum)

    def take_diagnostics(self) -> list[dict]:
        """Diagnostics since the last call."""
        taken = [{**line, "document": self._planned.name} for line in self._diagnostics]
        self._diagnostics.clear()
        return taken

    def _computed(self, name: str) -> torch.Tensor:
        import torch

        block, output = self._planned.planned(name)
        if output.action in CONSTANT or 0 in output.shape:
            return torch.full(output.shape, float(output.action is Action.ONES), dtype=torch_dtype(output.dtype))
        if block.index not in self._blocks:
            while len(self._blocks) >= self._cached_blocks:
                self._blocks.popitem(last=False)
            self._blocks[block.index] = _PartialBlock(self._computer.compute(block, self._diagnostics))
        self._blocks.move_to_end(block.index)
        try:
            with during(COMPUTED):  # though it is read
                if methods()[block.method].learns:  # what was learned is not kept for its last layer
                    self._blocks[block.index].complete()
                return self._blocks[block.index].tensor(name)
        except DeusMergeError as error:
            error.where = f"{self._planned.where}: {error.where}" if error.where else self._planned.where
            raise


class _PartialBlock:
    """A block whose outputs are computed as they are asked for."""

    def __init__(self, computing: Iterator[Computed]):
        self._computing = computing
        self._tensors: dict[str, torch.Tensor] = {}
        self._missing: dict[str, int] = {}  # elements of tensors of which only some runs are there

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor on the CPU; the block is computed until it is there."""
        while name not in self._tensors or self._missing[name]:
            self._add(next(self._computing))
        return self._tensors[name]

    def complete(self) -> None:
        """Compute all of the block."""
        for computed in self._computing:
            self._add(computed)

    def _add(self, computed: Computed) -> None:
        import torch

        output, chunk = computed
        assert chunk.values is not None
        name, values = output.name, chunk.values.detach().to("cpu")
        if chunk.start is None:
            self._tensors[name], self._missing[name] = values.contiguous(), 0
            return
        if name not in self._tensors:
            self._tensors[name] = torch.empty(output.shape, dtype=values.dtype)
            self._missing[name] = math.prod(output.shape)
        flat = values.reshape(-1)
        self._tensors[name].view(-1)[chunk.start : chunk.start + flat.numel()] = flat
        self._missing[name] -= flat.numel()


def document_results(plan: Plan, device: torch.device | None, seed: int, limited: bool) -> dict[str, DocumentResult]:
    """The results of the documents that a plan takes tensors from, by name; ``limited``: in as little memory as
    possible."""
    results: dict[str, DocumentResult] = {}
    for document in plan.documents:
        minimum = max((document.plan.blocks[i].workspace(minimum=True) for i in document.runs), default=0)
        computer = BlockComputer(document.plan, device, seed, minimum if limited else None, results)
        results[document.name] = DocumentResult(document.result, computer, document.cached_blocks)
    return results
