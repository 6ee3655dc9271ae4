"""One output tensor in runs of elements: a run is widened, merged and yielded before the next is read.

This is fast on a CPU because runs stay in the cache, a sum with a narrower tensor widens it on the way, and
comparisons answer with 0 and 1 in their operands' own dtype, since torch takes ten times as long for bool.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.tensors import OutputChunk
from .base import COMPUTE, CONCURRENT_OUTPUTS, Block, FlatTensor, MergeMethod, OutputTensor

if TYPE_CHECKING:
    import torch

RUN_ELEMENTS = 1 << 18  # elements: enough work for a few threads, little enough for the cache
_RUN_ON_DEVICE = 1 << 24
_ROW = 1024  # elements that one thread adds up
_BYTES = 40  # per element of a run while it is computed, plus 16 for each source


@dataclass(frozen=True)
class FlatInputs:
    """The inputs of one output tensor, flat.

    Attributes:
        output: The output.
        block: Whose output it is.
        stored: One vector per source, (n,), in its stored dtype. Never written to.
        dtype: The dtype of the arithmetic: float32, or float64 where a source is stored so.
        step: No run ends within a multiple of this: the length of a row, where rows belong together.
    """

    output: OutputTensor
    block: Block
    stored: Sequence[FlatTensor]
    dtype: torch.dtype
    step: int = 1

    @property
    def base(self) -> int | None:
        """Which source is the base model."""
        return self.output.base

    @property
    def base_model(self) -> int:
        """The same, for methods that need a base model."""
        assert self.output.base is not None, f"{self.output.name} has no base model"
        return self.output.base

    @property
    def others(self) -> list[int]:
        """The sources that are not the base model."""
        return others(self.output)

    @property
    def numel(self) -> int:
        return math.prod(self.output.shape)

    def source(self, i: int, run: slice) -> torch.Tensor:
        """A source's run, (m,), in the arithmetic's dtype; it may be the stored memory, so only to be read."""
        return self.stored[i][run].to(self.dtype)

    def addend(self, i: int, run: slice) -> torch.Tensor:
        """A source's run, (m,), to be added to or converted to what is at least as wide; only to be read."""
        stored = self.stored[i][run]
        return stored if stored.element_size() > 1 else stored.to(self.dtype)  # sums do not widen float8

    def own(self, i: int, run: slice) -> torch.Tensor:
        """A source's run, (m,), in memory of its own."""
        return self.stored[i][run].to(self.dtype, copy=True)

    def delta(self, i: int, run: slice) -> torch.Tensor:
        """A source minus the base model, or the source itself where there is none, (m,), in its own memory."""
        own = self.own(i, run)
        return own if self.base is None else own.sub_(self.addend(self.base, run))

    def deltas(self, run: slice) -> torch.Tensor:
        """`delta` of every source but the base model, (s, m)."""
        import torch

        return torch.stack([self.delta(i, run) for i in self.others])

    @property
    def run_length(self) -> int:
        wanted = RUN_ELEMENTS if self.stored[0].device.type == "cpu" else _RUN_ON_DEVICE
        return max(1, wanted // self.step) * self.step

    def runs(self) -> Iterator[slice]:
        """The output's runs, in order."""
        length = self.run_length
        for start in range(0, self.numel, length):
            yield slice(start, min(start + length, self.numel))

    def each_run(self, merge: Callable[[slice], torch.Tensor]) -> Iterator[OutputChunk]:
        """The output, run by run; ``merge`` is called with its runs in order and returns their values, (m,)."""
        for run in self.runs():
            yield OutputChunk(self.output.role, merge(run), self.output.slot, run.start)


class TensorwiseMethod(MergeMethod):
    """A merge method whose outputs are computed one tensor at a time, in runs."""

    tensorwise = True

    def step(self, output: OutputTensor) -> int:
        """How many neighbouring elements belong together."""
        return 1

    @abstractmethod
    def compute(self, inputs: FlatInputs) -> Iterator[OutputChunk]:
        """One output."""

    def merge(self, block):
        import torch

        for output in block.outputs:
            if output.computed:
                stored = [block.flat(output.role, i) for i in range(len(output.source_parameters))]  # (n,) each
                double = any(s.dtype == torch.float64 for s in stored)
                yield from self.compute(
                    FlatInputs(output, block, stored, torch.float64 if double else torch.float32, self.step(output))
                )

    def decide(self, output):
        return COMPUTE

    def workspace(self, outputs):
        """A run of every source, those being computed and those on their way to the disk, of each concurrent output."""

        def size(output: OutputTensor) -> int:
            run = min(math.prod(output.shape), max(RUN_ELEMENTS, self.step(output)))
            return run * (_BYTES + 16 * len(output.source_parameters))

        return CONCURRENT_OUTPUTS * max(map(size, outputs), default=0)


def others(output: OutputTensor) -> list[int]:
    """The sources of an output that are not the base model."""
    return [i for i in range(len(output.source_parameters)) if i != output.base]


def row_length(shape: tuple[int, ...]) -> int:
    """How many elements one index of the first axis has; a vector is one row."""
    return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of a vector (m,), a float64 scalar: by rows, so that it does not depend on the number of threads."""
    import torch

    whole = len(values) // _ROW * _ROW
    rows = values[:whole].view(-1, _ROW).sum(dim=1)  # (m / _ROW,)
    return rows.sum(dtype=torch.float64) + values[whole:].sum(dtype=torch.float64)


def weighted_sum(inputs: FlatInputs, weights: Sequence[float], run: slice) -> torch.Tensor:
    """``Σ w_i x_i`` over a run, (m,); sources of weight 0 are not read."""
    used = [(i, w) for i, w in enumerate(weights) if w != 0] or [(0, 0.0)]
    result = inputs.own(used[0][0], run).mul_(used[0][1])
    for i, weight in used[1:]:
        result.add_(inputs.addend(i, run), alpha=weight)
    return result
