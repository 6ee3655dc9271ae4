"""The plan: every output tensor, how it comes about and where it will stand, before any tensor is read.

A `Plan` is plain data. Blocks are independent of each other: inputs, method, parameters and output offsets all stand
here, so any worker that sees the files can do any block in any order.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..checkpoint.header import read_small
from ..checkpoint.layout import ShardLayout
from ..checkpoint.reader import TensorSource
from ..methods.registry import methods
from ..models.source import SourceModel
from ..recipe.types import Recipe
from .blocks import BlockPlan, PlannedTensor, in_output_order

#: raised when the meaning of a plan changes, so that old journals and manifests are not mistaken for new ones
FORMAT = 1
_TORCH_BYTES = 330_000_000  # anonymous memory of a process that has imported torch
_PYTHON_BYTES = 50_000_000
_TOKEN_BYTES = 2500  # of one token, while tokenizers are united
_COPY_RATE = 1e9  # bytes/s, a guess for the time estimate
_MERGE_RATE = 3e8


@dataclass(frozen=True)
class DocumentPlan:
    """A document whose result others take as a model: it is written nowhere.

    Attributes:
        result: As the others see it.
        plan: What it would do by itself.
        kept: How many of its finished blocks stay in memory for others to come.
        made: Its blocks -> how often a run makes them. Those from which only copies are taken are not made at all.
    """

    result: TensorSource
    plan: Plan
    kept: int
    made: Mapping[int, int]

    @property
    def name(self) -> str:
        return self.plan.recipe.name


@dataclass(frozen=True)
class Plan:
    """Everything a run will do.

    Attributes:
        recipe: Expanded: slices only, presets spelled out.
        models: The donor first.
        blocks: In output order.
        shards: The output files with their exact headers.
        config: The output's config.json.
        files: Other output files: name -> bytes, or a file to copy.
        warnings: What the user should know.
        documents: Those whose results it takes, directly or not, each behind the ones that it needs itself.
        vocabulary: What the recipe's tokenizer settings come to, as JSON data; None without them.
    """

    recipe: Recipe
    models: tuple[SourceModel, ...]
    blocks: tuple[BlockPlan, ...]
    shards: tuple[ShardLayout, ...]
    config: Mapping
    files: Mapping[str, bytes | Path]
    warnings: tuple[str, ...]
    documents: tuple[DocumentPlan, ...] = ()
    vocabulary: Mapping | None = None

    @property
    def donor(self) -> SourceModel:
        """The base, or the first model named: whose config, tokenizer, embeddings and head the output takes."""
        return self.models[0]

    @cached_property
    def modules(self) -> dict[str | None, tuple[BlockPlan, ...]]:
        """Blocks of layers by module; None: of a recipe that does not speak of modules."""
        names = dict.fromkeys(b.module for b in self.blocks if b.layers)
        return {name: tuple(b for b in self.blocks if b.module == name and b.layers) for name in names}

    @property
    def main_blocks(self) -> tuple[BlockPlan, ...]:
        """Blocks of the main stack's layers; none where the recipe leaves it to the donor."""
        return self.modules.get(None) or self.modules.get(self.donor.main, ())

    @property
    def num_layers(self) -> int:
        """Of the main stack."""
        made = sum(len(b.layers) for b in self.main_blocks)
        return made or self.donor.view.num_layers

    @cached_property
    def outputs(self) -> tuple[tuple[BlockPlan, PlannedTensor], ...]:
        """Every tensor with its block, in the order of the output."""
        return in_output_order(self.blocks)

    @property
    def new_layers(self) -> tuple[int, ...]:
        """Of the main stack."""
        return tuple(sorted(layer for b in self.main_blocks if b.new for layer in b.layers))

    @property
    def new_parameters(self) -> tuple[str, ...]:
        """Exact names of the tensors to train."""
        return tuple(t.task.name for b, t in self.outputs if b.new)

    @cached_property
    def function_preserving(self) -> bool:
        """Whether the output computes what the base computes: its layers in order, and new ones that add nothing."""
        if self.vocabulary and not self.vocabulary["kept"]:
            return False
        base = self.donor
        kept: dict[str | None, list] = {}
        for block in self.blocks:
            if block.new:
                view = base.modules[block.module] if block.module else base.view
                writers = {r for r in view.residual_writers() if r in {t.task.role for t in block.tensors}}
                if not writers or any(t.action != "zeros" for t in block.tensors if t.task.role in writers):
                    return False
            elif any(not t.kept or block.sources[t.source].model != 0 for t in block.tensors):
                return False
            elif block.layers:
                kept.setdefault(block.module, []).append(block.sources[0].layer)
        depths = {name: (base.modules[name] if name else base.view).num_layers for name in self.modules}
        return all(kept.get(name) == list(range(depth)) for name, depth in depths.items())

    @property
    def bytes_read(self) -> int:
        """Of all inputs, also those that documents have made, and what these read each time they make a block."""
        return sum(t.nbytes_read for b in self._runs() for t in b.tensors)

    @property
    def bytes_written(self) -> int:
        return sum(s.size for s in self.shards)

    @property
    def peak_memory(self) -> int:
        """Estimated peak of anonymous memory in bytes (mapped files are the kernel's cache and do not count)."""
        return self._memory(least=False)

    @property
    def least_memory(self) -> int:
        """What it can do with: under ``--max-memory`` plans work in row blocks."""
        return self._memory(least=True)

    def _memory(self, least: bool) -> int:
        planning = _TOKEN_BYTES * self.vocabulary["tokens"] if self.vocabulary else 0
        if not planning and not any(b.computes for b in self.blocks):
            return _PYTHON_BYTES
        return self._resident + max(planning, *(b.workspace(least) + self.reading(b, least) for b in self.blocks))

    def block_memory(self, limit: int | None) -> int | None:
        """What a limit on the process leaves for one block."""
        reading = max((self.reading(b, True) for b in self.blocks), default=0)
        return None if limit is None else max(0, limit - self._resident - reading)

    @property
    def _resident(self) -> int:
        """What is there all the time: torch, and the blocks of documents that are kept."""
        return _TORCH_BYTES + sum(d.kept * max(b.nbytes for b in d.plan.blocks) for d in self.documents)

    def reading(self, block: BlockPlan, least: bool = False) -> int:
        """Estimated bytes that reading one of a block's inputs takes, where that is more than mapping it."""
        read = ((s, i.name) for t in block.tensors for s, i in zip(block.sources, t.inputs, strict=True) if i.derived)
        return max((self.models[s.model].checkpoint.workspace(name, least) for s, name in read), default=0)

    def _runs(self) -> Iterator[BlockPlan]:
        """Every block as often as it is made."""
        yield from self.blocks
        for document in self.documents:
            for index, times in document.made.items():
                yield from [document.plan.blocks[index]] * times

    @property
    def seconds(self) -> float:
        """A rough estimate of the time on a CPU."""
        merged = 0.0
        for block in self._runs():
            weight = 40.0 if methods()[block.method].inserts else 1.0
            merged += weight * sum(t.nbytes_read for t in block.tensors if t.action in ("merge", "cast"))
        return 1.0 + self.bytes_written / _COPY_RATE + merged / _MERGE_RATE

    @cached_property
    def hash(self) -> str:
        """sha256 over all that decides the output's bytes; places of files do not."""
        text = json.dumps(self._identity(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def layer_map(self, blocks: Sequence[BlockPlan] | None = None) -> list[dict]:
        """One entry per output layer: where it comes from. Of the main stack, or of these blocks."""
        entries = [
            {
                "layer": layer,
                "new": block.new,
                "kind": block.kind,
                "method": block.method,
                "sources": [{"model": str(self.models[s.model].ref), "layer": s.layer} for s in block.sources_of(slot)],
            }
            for block in (self.main_blocks if blocks is None else blocks)
            for slot, layer in enumerate(block.layers)
        ]
        return sorted(entries, key=lambda entry: entry["layer"])

    def module_maps(self) -> dict[str, dict]:
        """``num_layers`` and ``layers``, as in the layer map, of every other module that the recipe names."""
        others = {name: blocks for name, blocks in self.modules.items() if blocks != self.main_blocks}
        maps = {name: self.layer_map(blocks) for name, blocks in others.items()}
        return {name: {"num_layers": len(layers), "layers": layers} for name, layers in maps.items()}

    def describe(self) -> dict:
        """The plan as JSON data."""
        actions = Counter(t.action for b in self.blocks for t in b.tensors)
        return {
            "format": FORMAT,
            "plan_hash": self.hash,
            "models": [
                {
                    "model": str(m.ref),
                    "family": m.view.architecture.family if m.view.architecture else None,
                    "model_type": m.view.model_type,
                    "layers": m.view.num_layers,
                    "fingerprint": m.checkpoint.fingerprint,
                }
                for m in self.models
            ],
            "donor": str(self.donor.ref),
            "num_layers": self.num_layers,
            "new_layers": list(self.new_layers),
            "function_preserving": self.function_preserving,
            "layers": self.layer_map(),
            **({"modules": maps} if (maps := self.module_maps()) else {}),
            **({"documents": [_describe_document(d) for d in self.documents]} if self.documents else {}),
            "tensors": dict(sorted(actions.items())),
            "shards": [{"file": s.filename, "bytes": s.size, "tensors": len(s.tensors)} for s in self.shards],
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "peak_memory_bytes": self.peak_memory,
            "least_memory_bytes": self.least_memory,
            "seconds_estimate": round(self.seconds, 1),
            "warnings": list(self.warnings),
            **({"vocabulary": self.vocabulary} if self.vocabulary else {}),
        }

    def _identity(self) -> dict:
        shards = [hashlib.sha256(s.header).hexdigest() for s in self.shards]
        files = {name: _digest(content) for name, content in self.files.items()}
        return {
            "format": FORMAT,
            "models": [m.checkpoint.fingerprint for m in self.models],
            "blocks": [b.identity() for b in self.blocks],
            "shards": [[s.filename, digest] for s, digest in zip(self.shards, shards, strict=True)],
            "config": self.config,
            "files": files,
            **({"vocabulary": {**self.vocabulary, "tokenizer": None}} if self.vocabulary else {}),
        }


def _describe_document(document: DocumentPlan) -> dict:
    plan = document.plan
    return {
        "name": document.name,
        "plan_hash": plan.hash,
        "models": [str(m.ref) for m in plan.models],
        "num_layers": plan.num_layers,
        "layers": plan.layer_map(),
        "blocks": len(plan.blocks),
        "blocks_made": sum(document.made.values()),
        "blocks_kept": document.kept,
    }


def _digest(content: bytes | Path) -> str:
    return hashlib.sha256(content if isinstance(content, bytes) else read_small(content)).hexdigest()
