"""Makes what a plan computes: each tensor in its output dtype, whole or in runs; and the results of documents."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..align.parameters import merge_aligned
from ..checkpoint.flat import FlatRows
from ..checkpoint.reader import TensorSource
from ..core.errors import CheckpointError, DeusMergeError
from ..core.units import dtype_name, torch_dtype
from ..methods.base import Flat, TensorTask
from ..methods.registry import methods
from ..models.tokenizer.permuted import PermutedCheckpoint
from ..plan.blocks import CAST_BYTES, BlockPlan, PlannedTensor
from ..plan.documents import PlannedResult
from ..plan.types import Plan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Piece:
    """A finished tensor in its output dtype, or a run of its elements.

    Attributes:
        planned: Which one.
        tensor: Its values, on the device of the merge.
        start: Of a run: its first element in the flattened tensor.
    """

    planned: PlannedTensor
    tensor: torch.Tensor
    start: int | None = None


class Maker:
    """Makes blocks of one plan.

    Args:
        plan: The plan.
        device: Where the arithmetic is done.
        seed: For methods that draw random numbers.
        memory: Bytes that a method may have alive at once; None for no limit.
        results: Of the documents that the plan takes tensors from, by name.
    """

    def __init__(
        self,
        plan: Plan,
        device: torch.device | None,
        seed: int,
        memory: int | None,
        results: Mapping[str, TensorSource],
    ):
        self.plan, self.device, self.seed, self.memory = plan, device, seed, memory
        self.sources = [model.checkpoint.bound(results) for model in plan.models]

    def load(self, block: BlockPlan) -> dict[tuple[str, int], torch.Tensor]:
        """Start reading what the block will merge: into the kernel's cache, or onto the device."""
        loaded = {}
        if methods()[block.method].learns:  # its inputs are a whole model
            return loaded
        for t in block.tensors:
            if t.action != "merge" or t.task.slot:
                continue
            for i, info in enumerate(t.inputs):
                source = self.source(block, i)
                if self.device is None or self.device.type == "cpu":
                    source.prefetch([info.name])
                elif not info.derived:
                    loaded[t.task.role, i] = source.read(info.name).to(self.device)
        return loaded

    def make(self, block: BlockPlan, told: list[dict], loaded: dict | None = None) -> Iterator[Piece]:
        """What a block computes, piece by piece.

        Args:
            block: One of the plan's.
            told: What its method tells is added here.
            loaded: What `load` has read.

        Raises:
            CheckpointError: a tensor that becomes NaN or infinity.
            DeusMergeError: what the method cannot do.
        """
        yield from self.casts(block)
        if any(t.action == "merge" for t in block.tensors):
            yield from self.merged(block, told, loaded or {})

    def separate(self, block: BlockPlan) -> list[TensorTask]:
        """Outputs of a block that can be made at the same time, the largest first: no thread ends long before another.
        None where they are made together, or read from what keeps something between reads."""
        if block.align or not methods()[block.method].tensorwise:
            return []
        if any(info.derived for t in block.tensors for info in t.inputs):
            return []
        tasks = [t.task for t in block.tensors if t.action == "merge"]
        return sorted(tasks, key=lambda task: -math.prod(task.shape))

    def casts(self, block: BlockPlan) -> Iterator[Piece]:
        """What a block only reads, in another dtype or derived."""
        for t in block.tensors:
            if t.action == "cast":
                yield from self._cast(block, t)

    def source(self, block: BlockPlan, i: int) -> TensorSource:
        """What a block's source is read from."""
        return self.sources[block.sources[i].model]

    def merged(
        self, block: BlockPlan, told: list[dict], loaded: dict, only: TensorTask | None = None
    ) -> Iterator[Piece]:
        """What a block's method makes, or only one output of it; arguments as of `make`."""
        inputs = _Inputs(self, block, loaded)
        if only is not None:
            inputs.tasks = [only]
        planned = {t.task.name: t for t in block.tensors}
        try:
            method = methods()[block.method]
            for made in merge_aligned(method, inputs, block.align) if block.align else method.merge(inputs):
                if made.diagnostics is not None:
                    told.append({"tensor": made.task.name, **made.diagnostics})
                if made.tensor is not None:
                    yield _finished(planned[made.task.name], made.tensor, made.start)
        except DeusMergeError as error:
            place = inputs.names(str(error.where)) or error.where
            error.where = f"{block.title}: {place}" if place else block.title
            raise

    def _cast(self, block: BlockPlan, planned: PlannedTensor) -> Iterator[Piece]:
        """Another dtype and nothing else: a slice of rows at a time."""
        info = planned.inputs[planned.source]
        source = self.source(block, planned.source)
        if not info.shape:
            yield _finished(planned, source.read(info.name), None)
            return
        rows = max(1, CAST_BYTES // max(1, info.nbytes // max(1, info.shape[0])))
        for start in range(0, info.shape[0], rows):
            piece = source.slice(info.name, start, min(start + rows, info.shape[0]))
            yield _finished(planned, piece, start * math.prod(info.shape[1:]))


def _finished(planned: PlannedTensor, tensor: torch.Tensor, start: int | None) -> Piece:
    """Cast once, and look for what no weight may be."""
    tensor = tensor.to(torch_dtype(planned.dtype))
    if not _finite(tensor):
        raise CheckpointError(
            f"{planned.task.name} becomes NaN or infinity",
            where=planned.inputs[0].file,
            expected=f"finite values that fit {dtype_name(planned.dtype)}",
            hint="look for NaN in the sources, or choose a wider dtype",
        )
    return Piece(planned, tensor, start)


def _finite(tensor: torch.Tensor) -> bool:
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor if tensor.element_size() > 1 else tensor.to(torch.float32)  # float8 has no order
    return bool(torch.isfinite(torch.stack(torch.aminmax(wide))).all())  # NaN is both ends, and this is faster


class _Inputs:
    """A block as its method sees it (`method.Block`)."""

    def __init__(self, maker: Maker, block: BlockPlan, loaded: dict):
        self.tasks: list[TensorTask] = [t.task for t in block.tensors]
        self.base, self.memory = block.base, maker.memory
        self._maker, self._block, self._loaded = maker, block, loaded
        self._inputs = {t.task.role: t.inputs for t in block.tensors}

    def read(self, role: str, source: int) -> torch.Tensor:
        if (role, source) in self._loaded:
            return self._loaded.pop((role, source))
        stored = self._maker.source(self._block, source).read(self._inputs[role][source].name)
        return stored.to(self._maker.device)

    def flat(self, role: str, source: int) -> Flat:
        stored, info = self._maker.source(self._block, source), self._inputs[role][source]
        if isinstance(stored, PermutedCheckpoint) and info.derived and self._maker.device.type == "cpu":
            return FlatRows(stored, info)
        return self.read(role, source).reshape(-1)

    def names(self, role: str) -> str | None:
        """The stored tensors of a role, for messages."""
        if role not in self._inputs:
            return None
        stored = list(dict.fromkeys(i.name for i in self._inputs[role]))
        return f"{role} ({' and '.join(stored) if len(stored) < 4 else f'{stored[0]} to {stored[-1]}'})"

    def generator(self, task: TensorTask, source: int) -> torch.Generator:
        import torch

        digest = hashlib.sha256(f"{self._maker.seed} {source} {task.name}".encode()).digest()
        return torch.Generator(self._maker.device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))


class Result:
    """A document's result in one run (`TensorSource`): its blocks are made when a tensor of theirs is asked for.

    A block is made as far as its method must go for that tensor. What is made has the bytes that a file would have; the
    few blocks that were asked for last are kept.

    Args:
        planned: What is made.
        maker: Of the document's blocks.
        kept: How many blocks stay in memory.
    """

    def __init__(self, planned: PlannedResult, maker: Maker, kept: int):
        self._planned, self._maker, self._kept = planned, maker, kept
        self._blocks: OrderedDict[int, _Growing] = OrderedDict()
        self.told: list[dict] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._planned, name)

    def read(self, name: str) -> torch.Tensor:
        block, t = self._planned.planned(name)
        if t.action == "copy":
            return self._maker.source(block, t.source).read(t.inputs[t.source].name)
        return self._made(name).clone()

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        block, t = self._planned.planned(name)
        if t.action == "copy":
            return self._maker.source(block, t.source).slice(t.inputs[t.source].name, start, stop)
        return self._made(name)[start:stop].clone()

    def prefetch(self, names: Iterable[str]) -> None:
        for block, t in (self._planned.planned(name) for name in names):
            for i in [] if t.action == "zeros" else range(len(t.inputs)) if t.source is None else [t.source]:
                self._maker.source(block, i).prefetch([t.inputs[i].name])

    def take_told(self) -> list[dict]:
        """What methods have told since the last call."""
        told, self.told[:] = [{**line, "document": self._planned.name} for line in self.told], []
        return told

    def _made(self, name: str) -> torch.Tensor:
        import torch

        block, t = self._planned.planned(name)
        if t.action == "zeros" or 0 in t.task.shape:
            return torch.zeros(t.task.shape, dtype=torch_dtype(t.dtype))
        if block.index not in self._blocks:
            while len(self._blocks) >= self._kept:
                self._blocks.popitem(last=False)
            self._blocks[block.index] = _Growing(self._maker.make(block, self.told))
        self._blocks.move_to_end(block.index)
        try:
            return self._blocks[block.index].tensor(name)
        except DeusMergeError as error:
            error.where = f"{self._planned.where}: {error.where}" if error.where else self._planned.where
            raise


class _Growing:
    """A block that is being made: its finished tensors, and the rest to come."""

    def __init__(self, pieces: Iterator[Piece]):
        self._pieces = pieces
        self._tensors: dict[str, torch.Tensor] = {}
        self._missing: dict[str, int] = {}  # elements of begun tensors

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor on the CPU; the block is made until it is there."""
        while name not in self._tensors or self._missing[name]:
            self._add(next(self._pieces))
        return self._tensors[name]

    def _add(self, piece: Piece) -> None:
        import torch

        name, values = piece.planned.task.name, piece.tensor.detach().to("cpu")
        if piece.start is None:
            self._tensors[name], self._missing[name] = values.contiguous(), 0
            return
        if name not in self._tensors:
            self._tensors[name] = torch.empty(piece.planned.task.shape, dtype=values.dtype)
            self._missing[name] = math.prod(piece.planned.task.shape)
        flat = values.reshape(-1)
        self._tensors[name].view(-1)[piece.start : piece.start + flat.numel()] = flat
        self._missing[name] -= flat.numel()


def results_of(plan: Plan, device: torch.device | None, seed: int, limited: bool) -> dict[str, Result]:
    """A run's results of the documents that a plan takes tensors from, by name; ``limited``: in as little memory as
    can be."""
    results: dict[str, Result] = {}
    for document in plan.documents:
        least = max((document.plan.blocks[i].workspace(least=True) for i in document.made), default=0)
        maker = Maker(document.plan, device, seed, least if limited else None, results)
        results[document.name] = Result(document.result, maker, document.kept)
    return results
