"""Computes the outputs of a block: each tensor in its output dtype, whole or in runs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..checkpoint.dequantized import DequantizedSource
from ..checkpoint.flat import FlatRows
from ..checkpoint.reader import TensorSource
from ..core.errors import CheckpointError, DeusMergeError
from ..core.tensors import Action, OutputChunk, StoredTensor
from ..core.units import dtype_name, is_finite, tensor_bytes, torch_dtype
from ..methods.base import FlatTensor, OutputTensor
from ..methods.registry import methods
from ..models.tokenizer.permuted import PermutedCheckpoint
from ..plan.blocks import CAST_BYTES, BlockPlan
from ..plan.documents import inputs_read
from ..plan.types import Plan
from .aligned import merge_aligned
from .times import READ, during

if TYPE_CHECKING:
    import torch

_DEQUANTIZED_BYTES = 8 << 20  # of a quantised tensor that is only cast, this much is alive at once

#: tensors that were read ahead onto a device: (role, source) -> tensor
Loaded = dict[tuple[str, int], "torch.Tensor"]
#: an output and values of it in its dtype
Computed = tuple[OutputTensor, OutputChunk]


class BlockComputer:
    """Computes blocks of one plan.

    Args:
        plan: The plan.
        device: Where the arithmetic is done; None when nothing is computed.
        seed: For methods that draw random numbers.
        memory: Bytes that a method may have alive at once; None for no limit.
        results: Results of the documents that the plan takes tensors from, by name.
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

    def load(self, block: BlockPlan) -> Loaded:
        """Start reading what the block will merge: into the kernel's cache, or onto the device."""
        loaded: Loaded = {}
        if methods()[block.method].learns:  # its inputs are a whole model
            return loaded
        for output in block.outputs:
            if output.action not in (Action.COMPUTE, Action.ALIGN) or output.slot:
                continue
            for i, stored in enumerate(output.inputs):
                source = self.source(block, i)
                if self.device is None or self.device.type == "cpu":
                    source.prefetch([stored.name])
                elif not stored.derived:
                    loaded[output.role, i] = source.read(stored.name).to(self.device)
        return loaded

    def compute(self, block: BlockPlan, diagnostics: list[dict], loaded: Loaded | None = None) -> Iterator[Computed]:
        """Everything in a block that is neither copied nor zeros.

        Args:
            block: One of the plan's.
            diagnostics: The list to which its method's diagnostics are added, as JSON data.
            loaded: The result of `load`.

        Raises:
            CheckpointError: a tensor that becomes NaN or infinity.
            DeusMergeError: the method refuses.
        """
        yield from self.read_outputs(block)
        if block.merges:
            yield from self.merge_outputs(block, diagnostics, loaded or {})

    def scale_warnings(self, block: BlockPlan) -> list[dict]:
        """Diagnostics about quantised inputs of a block whose scales hold zeros, as JSON data."""
        found = {}
        for output in block.outputs:
            for i in inputs_read(output):
                source, stored = self.source(block, i), output.inputs[i]
                if isinstance(source, DequantizedSource) and stored.quantization and stored.name not in found:
                    found[stored.name] = (output, source.zero_scales(stored.name))
        return [
            {"role": output.role, "tensor": output.name, "warning": f"{scales} holds zeros: so do the values"}
            for output, scales in found.values()
            if scales
        ]

    def read_outputs(self, block: BlockPlan) -> Iterator[Computed]:
        """Outputs that are only read, derived or in another dtype, a slice of rows at a time; and ones."""
        import torch

        for output in block.outputs:
            if output.action is Action.ONES:
                yield output, _finish(output, OutputChunk(output.role, torch.ones(output.shape), output.slot))
            if output.action not in (Action.CAST, Action.DERIVE):
                continue
            stored, source = output.stored, self.source(block, output.source)
            if not stored.shape:
                with during(READ):
                    values = source.read(stored.name)
                yield output, _finish(output, OutputChunk(output.role, values))
                continue
            row_bytes = max(stored.nbytes // max(1, stored.shape[0]), tensor_bytes("F32", stored.shape[1:]))
            rows = max(1, (_DEQUANTIZED_BYTES if stored.quantization else CAST_BYTES) // max(1, row_bytes))
            read = _rows(source, stored)
            for start in range(0, stored.shape[0], rows):
                values = read(start, min(start + rows, stored.shape[0]))
                chunk = OutputChunk(output.role, values, start=start * math.prod(stored.shape[1:]))
                yield output, _finish(output, chunk)

    def merge_outputs(
        self, block: BlockPlan, diagnostics: list[dict], loaded: Loaded, only: OutputTensor | None = None
    ) -> Iterator[Computed]:
        """The outputs that a block's method computes, or only one of them; arguments as in `compute`."""
        inputs = _BlockInputs(self, block, loaded, block.outputs if only is None else (only,))
        method = methods()[block.method]
        try:
            for chunk in merge_aligned(method, inputs, block.align) if block.align else method.merge(inputs):
                output = block.by_role[chunk.role, chunk.slot]
                if chunk.diagnostics is not None:
                    diagnostics.append({"tensor": output.name, **as_json(chunk.diagnostics)})
                if chunk.values is not None:
                    yield output, _finish(output, chunk)
        except DeusMergeError as error:
            place = inputs.stored_names(str(error.where)) or error.where
            error.where = f"{block.title}: {place}" if place else block.title
            raise

    def independent_outputs(self, block: BlockPlan) -> list[OutputTensor]:
        """Outputs of a block that can be computed at the same time, the largest first: no thread ends long before
        another. None where they are computed together, or read from a source that caches something between reads."""
        if block.align or not methods()[block.method].tensorwise:
            return []
        if any(i.derived and not i.quantization for output in block.outputs for i in output.inputs):
            return []
        return sorted((o for o in block.outputs if o.computed), key=lambda output: -math.prod(output.shape))

    def source(self, block: BlockPlan, i: int | None) -> TensorSource:
        """The source that one of a block's inputs is read from."""
        assert i is not None
        return self.sources[block.sources[i].model]


def as_json(diagnostics: Any) -> dict:
    """Diagnostics without the fields that say nothing."""
    optional = {"source"} if diagnostics.source is None else set()
    return {key: value for key, value in asdict(diagnostics).items() if key not in optional}


def _finish(output: OutputTensor, chunk: OutputChunk) -> OutputChunk:
    """Cast once, and refuse NaN and infinity.

    Raises:
        CheckpointError: they are there.
    """
    assert chunk.values is not None
    values = chunk.values.to(torch_dtype("F32" if output.quantization else output.dtype))
    if not is_finite(values):
        raise CheckpointError(
            f"{output.name} becomes NaN or infinity",
            where=output.inputs[0].file,
            expected=f"finite values that fit {dtype_name(output.dtype)}",
            hint="look for NaN in the sources, or choose a wider dtype",
        )
    return replace(chunk, values=values)


def _rows(source: TensorSource, stored: StoredTensor) -> Callable[[int, int], torch.Tensor]:
    """A function that gives rows of a tensor, as `TensorSource.slice` does, and counts its time as reading."""
    rows = _row_reader(source, stored)

    def read(start: int, stop: int) -> torch.Tensor:
        with during(READ):
            return rows(start, stop)

    return read


def _row_reader(source: TensorSource, stored: StoredTensor) -> Callable[[int, int], torch.Tensor]:
    if stored.quantization and isinstance(source, PermutedCheckpoint):
        source = source.givers(stored.name)[0]
    if stored.quantization and isinstance(source, DequantizedSource):
        return source.rows(stored.name)
    return partial(source.slice, stored.name)


class _BlockInputs:
    """A block as its method sees it (`methods.base.Block`)."""

    def __init__(self, computer: BlockComputer, block: BlockPlan, loaded: Loaded, outputs: Sequence[OutputTensor]):
        self.outputs, self.base, self.memory = outputs, block.base, computer.memory
        self._computer, self._block, self._loaded = computer, block, loaded
        self._inputs = {o.role: o.inputs for o in block.outputs}

    def read(self, role: str, source: int) -> torch.Tensor:
        if (role, source) in self._loaded:
            return self._loaded.pop((role, source))
        with during(READ):
            stored = self._computer.source(self._block, source).read(self._inputs[role][source].name)
            return stored.to(self._computer.device)

    def flat(self, role: str, source: int) -> FlatTensor:
        checkpoint, stored = self._computer.source(self._block, source), self._inputs[role][source]
        on_cpu = self._computer.device is not None and self._computer.device.type == "cpu"
        if on_cpu and stored.quantization:
            return FlatRows(_rows(checkpoint, stored), replace(stored, dtype="F32"))
        if on_cpu and isinstance(checkpoint, PermutedCheckpoint) and stored.derived:
            return FlatRows(_rows(checkpoint, stored), stored)
        return self.read(role, source).reshape(-1)

    def generator(self, output: OutputTensor, source: int) -> torch.Generator:
        import torch

        digest = hashlib.sha256(f"{self._computer.seed} {source} {output.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))

    def stored_names(self, role: str) -> str | None:
        """The stored tensors of a role, for messages."""
        if role not in self._inputs:
            return None
        stored = list(dict.fromkeys(i.name for i in self._inputs[role]))
        return f"{role} ({' and '.join(stored) if len(stored) < 4 else f'{stored[0]} to {stored[-1]}'})"
