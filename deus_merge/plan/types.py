"""The plan: every output tensor, how it comes about and where it goes, before any tensor is read.

A `Plan` is plain data, and can be pickled. Blocks are independent of each other: inputs, method, parameters and output
offsets are all in it, so any worker that reaches the files can make any block (`run.block_runner.run_blocks`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import nlargest
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.dequantized import quantized_share
from ..checkpoint.header import read_small
from ..checkpoint.layout import ShardLayout
from ..core.errors import CheckpointError
from ..core.garbage import collector_paused
from ..core.tensors import Action
from ..methods.base import OutputTensor
from ..models.source import SourceModel
from ..recipe.types import Recipe
from .blocks import BlockPlan, actions_of, are_identities, by_layer, in_output_order
from .display import html_text, short_text
from .timing import block_seconds
from .training_memory import ModelShape, TrainingMemory, TrainingSettings, training_memory
from .training_shape import shape_of_plan

if TYPE_CHECKING:
    from .calibration import PlannedCalibration
    from .documents import PlannedResult

#: raised when the meaning of a plan changes, so that old journals and manifests are not mistaken for new ones;
#: 2: files end at blocks, and the words for how tensors come about
FORMAT = 2
_TORCH_BYTES = 330_000_000  # anonymous memory of a process that has imported torch
_PYTHON_BYTES = 50_000_000
_TOKEN_BYTES = 2500  # of one token, while tokenizers are united


@dataclass(frozen=True)
class DocumentPlan:
    """A document whose result others take as a model: it is not written to the disk.

    Attributes:
        result: The source that the others read.
        plan: Its plan, as if it were run by itself.
        cached_blocks: How many of its finished blocks stay in memory for others to come.
        runs: Its blocks -> how often a run computes them. Those from which only copies are taken are not computed.
    """

    result: PlannedResult
    plan: Plan
    cached_blocks: int
    runs: Mapping[int, int]

    @property
    def name(self) -> str:
        return self.result.name


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
        warnings: Messages for the user.
        documents: Those whose results it takes, directly or not, each after the ones that it needs itself.
        vocabulary: The outcome of the recipe's tokenizer settings, as JSON data; None without them.
        calibration: What sets the zeroed outputs of new layers once all blocks are finished; None where nothing does.
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
    calibration: PlannedCalibration | None = None

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
        return len(by_layer(self.main_blocks)) or self.donor.view.num_layers

    @cached_property
    def outputs(self) -> tuple[tuple[BlockPlan, OutputTensor], ...]:
        """Every tensor with its block, in the order of the output."""
        return in_output_order(self.blocks)

    @property
    def new_layers(self) -> tuple[int, ...]:
        """Of the main stack."""
        return tuple(by_layer(b for b in self.main_blocks if b.new))

    @property
    def quantized(self) -> dict[str, dict[str, float]]:
        """What is written as codes, as `quantized_share`."""
        return quantized_share((o.quantization, o.shape) for _, o in self.outputs)

    @property
    def new_parameters(self) -> tuple[str, ...]:
        """Exact names of the tensors to train."""
        return tuple(o.name for b, o in self.outputs if b.new)

    @cached_property
    def shape(self) -> ModelShape:
        """The output as training sees it."""
        return shape_of_plan(self)

    def training_memory(self, settings: TrainingSettings | None = None) -> TrainingMemory | None:
        """Estimate the memory that training the new layers takes.

        Args:
            settings: How they are trained; None for the defaults.

        Returns:
            The estimate; None where there is nothing to train.
        """
        return training_memory(self.shape, settings or TrainingSettings())

    @cached_property
    def function_preserving(self) -> bool:
        """Whether the output computes what the base computes: its layers in order, and new ones that add nothing.
        A calibration comes after that."""
        if self.vocabulary and not self.vocabulary["kept"]:
            return False
        if not are_identities([b for b in self.blocks if b.new]):
            return False
        base = self.donor
        copied: dict[str | None, list[int | None]] = {}
        for block in (b for b in self.blocks if not b.new):
            if any(not _is_of_base(block, o) for o in block.outputs):
                return False
            if block.layers:
                copied.setdefault(block.module, []).append(block.sources[0].layer)
        depths = {name: (base.modules[name] if name else base.view).num_layers for name in self.modules}
        return all(copied.get(name) == list(range(depth)) for name, depth in depths.items())

    @property
    def bytes_read(self) -> int:
        """Of all inputs, those of documents included, as often as a run reads them."""
        return sum(o.nbytes_read for b in self._runs() for o in b.outputs)

    @property
    def bytes_written(self) -> int:
        return sum(s.size for s in self.shards)

    @property
    def peak_memory(self) -> int:
        """Estimated peak of anonymous memory in bytes (mapped files are the kernel's cache and do not count)."""
        return self._memory(minimum=False)

    @property
    def minimum_memory(self) -> int:
        """The same under ``--max-memory``, where plans work in row blocks."""
        return self._memory(minimum=True)

    def _memory(self, minimum: bool) -> int:
        planning = _TOKEN_BYTES * self.vocabulary["tokens"] if self.vocabulary else 0
        if not planning and not any(b.computes for b in self.blocks):
            return _PYTHON_BYTES
        blocks = (b.workspace(minimum) + self.reading_memory(b, minimum) for b in self.blocks)
        return self._baseline_memory + max(planning, *blocks)

    def __repr__(self) -> str:
        return f"Plan({short_text(self)})"

    def _repr_html_(self) -> str:
        return html_text(self)

    def check_sources(self) -> None:
        """Whether all sources are as they were when the plan was made.

        Raises:
            CheckpointError: one is not.
        """
        for model in self.models:
            files = model.checkpoint.files
            for old, new, file in zip(model.stamp, model.checkpoint.stamp(), files, strict=True):
                if old != new:
                    raise CheckpointError("the file has changed since the plan was made", where=file)

    def block_memory(self, limit: int | None) -> int | None:
        """The bytes that a limit on the process leaves for one block."""
        reading = max((self.reading_memory(b, True) for b in self.blocks), default=0)
        return None if limit is None else max(0, limit - self._baseline_memory - reading)

    @property
    def _baseline_memory(self) -> int:
        """torch, and the cached blocks of documents."""
        sizes = ((d.cached_blocks, (d.plan.blocks[i].nbytes for i in d.runs)) for d in self.documents)
        return _TORCH_BYTES + sum(sum(nlargest(cached, computed)) for cached, computed in sizes)

    def reading_memory(self, block: BlockPlan, minimum: bool = False) -> int:
        """Estimated bytes that reading one of a block's inputs takes, where that is more than mapping it."""
        read = ((s, i.name) for o in block.outputs for s, i in zip(block.sources, o.inputs, strict=True) if i.derived)
        return max((self.models[s.model].checkpoint.workspace(name, minimum) for s, name in read), default=0)

    def _runs(self) -> Iterator[BlockPlan]:
        """Every block as often as it is computed."""
        yield from self.blocks
        for document in self.documents:
            for index, times in document.runs.items():
                yield from [document.plan.blocks[index]] * times

    @property
    def seconds(self) -> float:
        """A rough estimate of the time on a CPU."""
        return 1.0 + sum(map(block_seconds, self._runs()))

    @cached_property
    def hash(self) -> str:
        """sha256 over all that decides the output's bytes, of the sources' weights only the headers."""
        with collector_paused():
            text = json.dumps(self._identity(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def layer_map(self, blocks: Sequence[BlockPlan] | None = None) -> list[dict]:
        """One entry per output layer: where it comes from and how. Of the main stack, or of these blocks."""
        entries = []
        for layer, made_in in by_layer(self.main_blocks if blocks is None else blocks).items():
            block = made_in[0]
            sources = block.sources_of(block.layers.index(layer))
            entries.append(
                {
                    "layer": layer,
                    "new": block.new,
                    "actions": list(actions_of(made_in)),
                    "method": block.method,
                    "sources": [{"model": str(self.models[s.model].ref), "layer": s.layer} for s in sources],
                }
            )
        return entries

    def module_maps(self) -> dict[str, dict]:
        """``num_layers`` and ``layers``, as in the layer map, of every other module that the recipe names."""
        others = {name: blocks for name, blocks in self.modules.items() if name and blocks != self.main_blocks}
        maps = {name: self.layer_map(blocks) for name, blocks in others.items()}
        return {name: {"num_layers": len(layers), "layers": layers} for name, layers in maps.items()}

    def describe(self, training: TrainingSettings | None = None) -> dict:
        """The plan as JSON data.

        Args:
            training: How the new layers are trained, for the estimate of memory; None for the defaults.
        """
        memory = self.training_memory(training)
        actions = Counter(o.action.value for b in self.blocks for o in b.outputs)
        return {
            "format": FORMAT,
            "plan_hash": self.hash,
            "models": [
                {
                    "model": str(m.ref),
                    "family": m.view.family.name if m.view.family else None,
                    "model_type": m.view.model_type,
                    "layers": m.view.num_layers,
                    "fingerprint": m.checkpoint.fingerprint,
                    **({"quantized": share} if (share := quantized_of(m)) else {}),
                }
                for m in self.models
            ],
            "donor": str(self.donor.ref),
            "num_layers": self.num_layers,
            "new_layers": list(self.new_layers),
            "function_preserving": self.function_preserving and self.calibration is None,
            **({"calibrate": self.calibration.describe()} if self.calibration else {}),
            **({"quantized": self.quantized} if self.quantized else {}),
            "layers": self.layer_map(),
            **({"modules": maps} if (maps := self.module_maps()) else {}),
            **({"documents": [_describe_document(d) for d in self.documents]} if self.documents else {}),
            "tensors": dict(sorted(actions.items())),
            "shards": [{"file": s.filename, "bytes": s.size, "tensors": len(s.tensors)} for s in self.shards],
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "peak_memory_bytes": self.peak_memory,
            "minimum_memory_bytes": self.minimum_memory,
            "seconds_estimate": round(self.seconds, 1),
            "parameters": self.shape.parameters,
            "new_parameters": self.shape.new_parameters,
            **({"training_memory": memory.describe()} if memory else {}),
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
            **({"calibrate": self.calibration.identity} if self.calibration else {}),
        }


def quantized_of(model: SourceModel) -> dict[str, dict[str, float]]:
    """How much of a model is quantised, as `quantized_share`."""
    return quantized_share((t.quantization, t.shape) for t in model.checkpoint.tensors.values())


def _describe_document(document: DocumentPlan) -> dict:
    plan = document.plan
    return {
        "name": document.name,
        "plan_hash": plan.hash,
        "models": [str(m.ref) for m in plan.models],
        "num_layers": plan.num_layers,
        "layers": plan.layer_map(),
        "blocks": len(plan.blocks),
        "blocks_computed": sum(document.runs.values()),
        "blocks_cached": document.cached_blocks,
    }


def _is_of_base(block: BlockPlan, output: OutputTensor) -> bool:
    """Whether an output is the base model's tensor with all its digits."""
    rounded = output.action is Action.DERIVE and output.stored.quantization is not None
    return output.action in (Action.COPY, Action.DERIVE) and not rounded and block.source_of(output).model == 0


def _digest(content: bytes | Path) -> str:
    return hashlib.sha256(content if isinstance(content, bytes) else read_small(content)).hexdigest()
