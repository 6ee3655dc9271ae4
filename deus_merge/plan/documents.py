"""The result of one document as a model of another: planned in full, written nowhere."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from ..checkpoint.reader import TensorInfo, TensorSource
from ..models.tokenizer.permuted import origins
from .blocks import BlockPlan, PlannedTensor
from .types import DocumentPlan, Plan

_KEPT = 2  # blocks: a new layer is made from two neighbours, of which the next one wants the second again


class PlannedResult:
    """What a document will have made, as a plan sees it: a `TensorSource` that is bound to a run before it is read.

    A tensor that the document copies is the one in the original file, under its new name. All others are derived: a run
    makes their block when one of them is asked for.

    Args:
        plan: The document's plan.
    """

    def __init__(self, plan: Plan):
        self.plan, self.name = plan, plan.recipe.name
        self.config, self.beside, self.fingerprint = dict(plan.config), plan.files, plan.hash
        self._planned = {t.task.name: (block, t) for block in plan.blocks for t in block.tensors}
        # In the order in which files would hold them: tensors that no family describes are planned as they are found.
        entries = [entry for shard in plan.shards for entry in shard.entries.values()]
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {e.name: self._info(e.name, e.dtype, e.nbytes) for e in entries}
        )

    @property
    def where(self) -> str:
        return f"document {self.name}"

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(f for m in self.plan.models for f in m.checkpoint.folders))

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(f for m in self.plan.models for f in m.checkpoint.files))

    @property
    def told(self) -> Mapping[str, object]:
        return {"document": self.name}

    def planned(self, name: str) -> tuple[BlockPlan, PlannedTensor]:
        """How a tensor comes about."""
        return self._planned[name]

    def origin(self, name: str) -> tuple[TensorSource, str]:
        block, t = self._planned[name]
        if t.action != "copy":
            return self, name
        return self.plan.models[block.sources[t.source].model].checkpoint.origin(t.inputs[t.source].name)

    def bound(self, results: Mapping[str, TensorSource]) -> TensorSource:
        return results[self.name]

    def workspace(self, name: str, least: bool = False) -> int:
        block, t = self._planned[name]
        return 0 if t.action == "copy" else block.workspace(least) + self.plan.reading(block, least)

    def _info(self, name: str, dtype: str, nbytes: int) -> TensorInfo:
        _, t = self._planned[name]
        if t.action == "copy":
            return replace(t.inputs[t.source], name=name)
        return TensorInfo(name, dtype, t.task.shape, t.inputs[0].file, 0, nbytes, derived=True)


def document_plans(plan: Plan, results: Sequence[PlannedResult]) -> tuple[DocumentPlan, ...]:
    """What a run of ``plan`` does with the documents whose results it takes.

    Args:
        plan: Of the last document.
        results: Of the others, each behind those that it needs.
    """
    plans = [plan, *(r.plan for r in results)]
    kept: Counter[str] = Counter()
    for part, block in ((p, b) for p in plans for b in p.blocks):
        kept |= Counter(result.name for result, _ in needed(part, block))  # all that one block wants at once
    made: dict[str, Counter[int]] = {r.name: Counter() for r in results}
    alive: dict[str, OrderedDict[int, None]] = {r.name: OrderedDict() for r in results}

    def make(plan: Plan, block: BlockPlan) -> None:
        for result, wanted in needed(plan, block):
            here = alive[result.name]
            if wanted.index not in here:
                make(result.plan, wanted)
                made[result.name][wanted.index] += 1
                here[wanted.index] = None
            here.move_to_end(wanted.index)
            if len(here) > max(_KEPT, kept[result.name]):
                here.popitem(last=False)

    for block in plan.blocks:
        make(plan, block)
    return tuple(
        DocumentPlan(r, r.plan, max(_KEPT, kept[r.name]) if made[r.name] else 0, dict(sorted(made[r.name].items())))
        for r in results
    )


def needed(plan: Plan, block: BlockPlan) -> list[tuple[PlannedResult, BlockPlan]]:
    """The blocks of other documents that a block takes tensors from which must be made, each once."""
    found: dict[tuple[str, int], tuple[PlannedResult, BlockPlan]] = {}
    for t in block.tensors:
        for i in range(len(t.inputs)) if t.action == "merge" else [t.source] if t.action == "cast" else []:
            for source, name in origins(plan.models[block.sources[i].model].checkpoint, t.inputs[i].name):
                if isinstance(source, PlannedResult):
                    wanted, made = source.planned(name)
                    if made.action != "zeros":
                        found[source.name, wanted.index] = source, wanted
    return list(found.values())
