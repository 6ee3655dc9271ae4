"""The plan: every output tensor, how it comes about and where it will stand, before any tensor is read.

A `Plan` is plain data. Blocks are independent of each other: inputs, method, parameters and output offsets all stand
here, so any worker that sees the files can do any block in any order.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from .alignment import AlignTo, plan_memory
from .architecture import ModelView, view_model
from .checkpoint.hub import resolve
from .checkpoint.layout import ShardLayout
from .checkpoint.reader import Checkpoint, TensorInfo, TensorSource
from .config import check_config
from .errors import DeusMergeError
from .method import CopyOf, TensorTask, Zeros
from .recipe import ModelRef, Recipe, methods

#: raised when the meaning of a plan changes, so that old journals and manifests are not mistaken for new ones
FORMAT = 1
_TORCH_BYTES = 330_000_000  # anonymous memory of a process that has imported torch
_PYTHON_BYTES = 50_000_000
_COPY_RATE = 1e9  # bytes/s, a guess for the time estimate
_MERGE_RATE = 3e8


@dataclass(frozen=True)
class SourceModel:
    """A model the plan reads.

    Attributes:
        ref: As the recipe names it.
        checkpoint: Its tensors.
        view: Its tensors by layer and role.
    """

    ref: ModelRef
    checkpoint: TensorSource
    view: ModelView

    @classmethod
    def open(cls, ref: ModelRef) -> SourceModel:
        """Find a model's folder (on the hub if need be), read its config and headers, and check that they agree.

        Raises:
            CheckpointError, ArchitectureError: with the place in the recipe that names the model.
        """
        try:
            checkpoint = Checkpoint.open(resolve(ref.text))
            view = view_model(checkpoint.config, tuple(checkpoint.tensors), checkpoint.folder)
            shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
            check_config(checkpoint.config, view, shapes, checkpoint.folder)
        except DeusMergeError as error:
            if ref.place.path:
                error.where = f"{ref.place.where}: {error.where}" if error.where else ref.place.where
            raise
        return cls(ref, checkpoint, view)


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
        """``copy``, ``cast``, ``fused`` or ``merged``, for tables."""
        if any(t.action == "merge" for t in self.tensors):
            return "fused" if self.new else "merged"
        if self.new:
            return "copy, zeroed" if any(t.action == "zeros" for t in self.tensors) else "copy"
        actions = {t.action for t in self.tensors}
        return "cast" if "cast" in actions else "copy" if actions == {"copy"} else "copy, zeroed"

    def workspace(self, least: bool = False) -> int:
        """Estimated bytes alive at once while this block is made; ``least``: when plans make their buffers again."""
        merged = [t.task for t in self.tensors if t.action == "merge"]
        widest = max((t.inputs[t.source].nbytes * 3 for t in self.tensors if t.action == "cast"), default=0)
        if not merged:
            return widest
        method = methods()[self.method]
        made = method.least_workspace(merged) if least else method.workspace(merged)
        if self.align:
            made += plan_memory(self.align.values, [t.task for t in self.tensors])[least]
        return max(widest, made)


@dataclass(frozen=True)
class Plan:
    """Everything a run will do.

    Attributes:
        recipe: Expanded: slices only, presets spelled out.
        models: Base (or first named) model first.
        blocks: In output order.
        shards: The output files with their exact headers.
        config: The output's config.json.
        files: Other output files: name -> bytes, or a file to copy.
        warnings: What the user should know.
    """

    recipe: Recipe
    models: tuple[SourceModel, ...]
    donor: int
    blocks: tuple[BlockPlan, ...]
    shards: tuple[ShardLayout, ...]
    config: Mapping
    files: Mapping[str, bytes | Path]
    warnings: tuple[str, ...]

    @property
    def num_layers(self) -> int:
        return sum(len(b.layers) for b in self.blocks)

    @cached_property
    def outputs(self) -> tuple[tuple[BlockPlan, PlannedTensor], ...]:
        """Every tensor with its block, in the order of the output."""
        return in_output_order(self.blocks)

    @property
    def new_layers(self) -> tuple[int, ...]:
        return tuple(sorted(layer for b in self.blocks if b.new for layer in b.layers))

    @property
    def new_parameters(self) -> tuple[str, ...]:
        """Exact names of the tensors to train."""
        return tuple(t.task.name for b, t in self.outputs if b.new)

    @cached_property
    def function_preserving(self) -> bool:
        """Whether the output computes what the base computes: its layers in order, and new ones that add nothing."""
        base = self.models[self.donor]
        kept = []
        for block in self.blocks:
            if block.new:
                writers = {r for r in base.view.residual_writers() if r in {t.task.role for t in block.tensors}}
                if not writers or any(t.action != "zeros" for t in block.tensors if t.task.role in writers):
                    return False
            elif any(t.action != "copy" or block.sources[t.source].model != self.donor for t in block.tensors):
                return False
            elif block.layers:
                kept.append(block.sources[0].layer)
        return kept == list(range(base.view.num_layers))

    @property
    def bytes_read(self) -> int:
        return sum(t.nbytes_read for b in self.blocks for t in b.tensors)

    @property
    def bytes_written(self) -> int:
        return sum(s.size for s in self.shards)

    @property
    def peak_memory(self) -> int:
        """Estimated peak of anonymous memory in bytes (mapped files are the kernel's cache and do not count)."""
        if not any(b.computes for b in self.blocks):
            return _PYTHON_BYTES
        return _TORCH_BYTES + max(b.workspace() for b in self.blocks)

    @property
    def least_memory(self) -> int:
        """What it can do with: under ``--max-memory`` plans work in row blocks."""
        if not any(b.computes for b in self.blocks):
            return _PYTHON_BYTES
        return _TORCH_BYTES + max(b.workspace(least=True) for b in self.blocks)

    @staticmethod
    def block_memory(limit: int | None) -> int | None:
        """What a limit on the process leaves for one block."""
        return None if limit is None else max(0, limit - _TORCH_BYTES)

    @property
    def seconds(self) -> float:
        """A rough estimate of the time on a CPU."""
        merged = 0.0
        for block in self.blocks:
            weight = 40.0 if methods()[block.method].inserts else 1.0
            merged += weight * sum(t.nbytes_read for t in block.tensors if t.action in ("merge", "cast"))
        return 1.0 + self.bytes_written / _COPY_RATE + merged / _MERGE_RATE

    @cached_property
    def hash(self) -> str:
        """sha256 over all that decides the output's bytes; places of files do not."""
        text = json.dumps(self._identity(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def layer_map(self) -> list[dict]:
        """One entry per output layer: where it comes from."""
        entries = [
            {
                "layer": layer,
                "new": block.new,
                "kind": block.kind,
                "method": block.method,
                "sources": [{"model": str(self.models[s.model].ref), "layer": s.layer} for s in block.sources_of(slot)],
            }
            for block in self.blocks
            for slot, layer in enumerate(block.layers)
        ]
        return sorted(entries, key=lambda entry: entry["layer"])

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
            "donor": str(self.models[self.donor].ref),
            "num_layers": self.num_layers,
            "new_layers": list(self.new_layers),
            "function_preserving": self.function_preserving,
            "layers": self.layer_map(),
            "tensors": dict(sorted(actions.items())),
            "shards": [{"file": s.filename, "bytes": s.size, "tensors": len(s.tensors)} for s in self.shards],
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "peak_memory_bytes": self.peak_memory,
            "least_memory_bytes": self.least_memory,
            "seconds_estimate": round(self.seconds, 1),
            "warnings": list(self.warnings),
        }

    def _identity(self) -> dict:
        shards = [hashlib.sha256(s.header).hexdigest() for s in self.shards]
        files = {name: _digest(content) for name, content in self.files.items()}
        return {
            "format": FORMAT,
            "models": [m.checkpoint.fingerprint for m in self.models],
            "blocks": [_block_identity(b) for b in self.blocks],
            "shards": [[s.filename, digest] for s, digest in zip(self.shards, shards, strict=True)],
            "config": self.config,
            "files": files,
        }


def _block_identity(block: BlockPlan) -> list:
    return [
        block.method,
        [[s.model, s.layer] for s in block.sources],
        block.base,
        *([[block.align.target, dict(block.align.values)]] if block.align else []),
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
            for t in block.tensors
        ],
    ]


def in_output_order(blocks: Sequence[BlockPlan]) -> tuple[tuple[BlockPlan, PlannedTensor], ...]:
    """Every tensor with its block: embeddings, layers, head. The layers of a block need not be neighbours."""
    depth = sum(len(b.layers) for b in blocks)

    def place(output: tuple[BlockPlan, PlannedTensor]) -> int:
        block, tensor = output
        return block.layers[tensor.task.slot] if block.layers else depth if block.index else -1

    return tuple(sorted(((b, t) for b in blocks for t in b.tensors), key=place))


def _digest(content: bytes | Path) -> str:
    return hashlib.sha256(content if isinstance(content, bytes) else content.read_bytes()).hexdigest()


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
