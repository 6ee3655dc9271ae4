"""The result of one document as a model of another: planned in full, never written to the disk."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from ..checkpoint.tensor_source import FileStamp, TensorSource
from ..core.tensors import CONSTANT, Action, StoredTensor
from ..core.units import tensor_bytes
from ..methods.base import OutputTensor
from ..models.tokenizer.permuted import roots
from .blocks import BlockPlan
from .types import DocumentPlan, Plan

_CACHED_BLOCKS = 2  # a new layer is made from two neighbours, of which the next one needs the second again


class PlannedResult:
    """A document's result as a plan sees it: a `TensorSource` that is bound to a run before it is read.

    A tensor that the document copies is the one in the original file, under its new name. All others are derived: a run
    computes their block when one of them is read.

    Args:
        plan: The document's plan.
    """

    def __init__(self, plan: Plan):
        self.plan, self.name = plan, plan.recipe.name or ""
        self.config, self.side_files, self.fingerprint = dict(plan.config), plan.files, plan.hash
        self._planned = {o.name: (block, o) for block in plan.blocks for o in block.outputs}
        # In the order in which files would hold them: tensors that no family describes are planned as they are found.
        written = {t.name: o for block in plan.blocks for o in block.outputs for t in o.written}
        outputs = dict.fromkeys(written[name].name for shard in plan.shards for name in shard.entries)
        self.tensors: Mapping[str, StoredTensor] = {name: self._info(name) for name in outputs}

    @property
    def where(self) -> str:
        return f"document {self.name}"

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(f for m in self.plan.models for f in m.checkpoint.folders))

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(f for m in self.plan.models for f in m.checkpoint.files))

    def stamp(self) -> list[FileStamp]:
        stamps = {f: s for m in self.plan.models for f, s in zip(m.checkpoint.files, m.checkpoint.stamp(), strict=True)}
        return list(stamps.values())

    @property
    def provenance(self) -> Mapping[str, object]:
        return {"document": self.name}

    def planned(self, name: str) -> tuple[BlockPlan, OutputTensor]:
        """How a tensor comes about."""
        return self._planned[name]

    def root(self, name: str) -> tuple[TensorSource, str]:
        block, output = self._planned[name]
        if output.action is not Action.COPY:
            return self, name
        return self.plan.models[block.source_of(output).model].checkpoint.root(output.stored.name)

    def read(self, name: str) -> NoReturn:
        raise RuntimeError(f"{self.where} has no tensors before a run computes them: bind it first")

    def slice(self, name: str, start: int, stop: int) -> NoReturn:
        self.read(name)

    def prefetch(self, names: Iterable[str]) -> NoReturn:
        self.read("")

    def bound(self, results: Mapping[str, TensorSource]) -> TensorSource:
        return results[self.name]

    def workspace(self, name: str, minimum: bool = False) -> int:
        block, output = self._planned[name]
        if output.action is Action.COPY:
            return 0
        return block.workspace(minimum) + self.plan.reading_memory(block, minimum)

    def _info(self, name: str) -> StoredTensor:
        _, output = self._planned[name]
        if output.action is Action.COPY:
            return replace(output.stored, name=name)
        nbytes = tensor_bytes(output.dtype, output.shape)
        return StoredTensor(name, output.dtype, output.shape, output.inputs[0].file, 0, nbytes, derived=True)


def document_plans(plan: Plan, results: Sequence[PlannedResult]) -> tuple[DocumentPlan, ...]:
    """How often a run of ``plan`` computes the blocks of the documents whose results it takes.

    Args:
        plan: The last document's plan.
        results: The others' results, each after those that it needs.
    """
    plans = [plan, *(r.plan for r in results)]
    at_once: Counter[str] = Counter()  # blocks of each document that one block needs at the same time
    for part, block in ((p, b) for p in plans for b in p.blocks):
        at_once |= Counter(result.name for result, _ in needed(part, block))
    runs: dict[str, Counter[int]] = {r.name: Counter() for r in results}
    cached: dict[str, OrderedDict[int, None]] = {r.name: OrderedDict() for r in results}

    def simulate(plan: Plan, block: BlockPlan) -> None:
        for result, wanted in needed(plan, block):
            here = cached[result.name]
            if wanted.index not in here:
                simulate(result.plan, wanted)
                runs[result.name][wanted.index] += 1
                here[wanted.index] = None
            here.move_to_end(wanted.index)
            if len(here) > max(_CACHED_BLOCKS, at_once[result.name]):
                here.popitem(last=False)

    for block in plan.blocks:
        simulate(plan, block)
    return tuple(
        DocumentPlan(
            r, r.plan, max(_CACHED_BLOCKS, at_once[r.name]) if runs[r.name] else 0, dict(sorted(runs[r.name].items()))
        )
        for r in results
    )


def needed(plan: Plan, block: BlockPlan) -> list[tuple[PlannedResult, BlockPlan]]:
    """The blocks of other documents that must be computed for a block, each once."""
    found: dict[tuple[str, int], tuple[PlannedResult, BlockPlan]] = {}
    for output in block.outputs:
        for i in inputs_read(output):
            for source, name in roots(plan.models[block.sources[i].model].checkpoint, output.inputs[i].name):
                if isinstance(source, PlannedResult):
                    wanted, taken = source.planned(name)
                    if taken.action not in CONSTANT:
                        found[source.name, wanted.index] = source, wanted
    return list(found.values())


def inputs_read(output: OutputTensor) -> range:
    """The sources that are read through this process for an output."""
    if output.action in (Action.COPY, *CONSTANT):
        return range(0)
    if output.action in (Action.CAST, Action.DERIVE) and output.source is not None:
        return range(output.source, output.source + 1)
    return range(len(output.inputs))
