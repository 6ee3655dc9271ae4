"""The interface of a merge method: parameters, requirements, and a pure function from a block's tensors to new ones.

A method is one file in this folder that defines ``METHOD``. It never sees files: it gets a `Block`, which reads its
inputs on demand onto the device, and yields its outputs one by one, so that the caller can cast, write and free each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..core.parameters import Parameter
from ..core.tensors import CONSTANT, UNCHANGED, Action, OutputChunk, Quantization, StoredTensor, WrittenTensor
from ..core.units import tensor_bytes
from ..models.spec import Heads, TensorSpec

if TYPE_CHECKING:
    import torch

#: how many outputs of a tensorwise method are computed at the same time, at most
CONCURRENT_OUTPUTS = 4


@dataclass(frozen=True)
class Decision:
    """A method's decision about an output tensor, made before any tensor is read.

    Attributes:
        action: ``COPY`` (one source's tensor), ``ZEROS``, ``ONES`` or ``COMPUTE``.
        source: For ``COPY``: which source of the block.
    """

    action: Action
    source: int | None = None


COMPUTE = Decision(Action.COMPUTE)
ZEROS = Decision(Action.ZEROS)
ONES = Decision(Action.ONES)


def copy_of(source: int | None) -> Decision:
    """The tensor of one source as it is."""
    return Decision(Action.COPY, source)


@dataclass(frozen=True)
class Refusal:
    """Why a method cannot make a block.

    Attributes:
        message: The reason.
        parameter: The parameter to blame, if one is.
    """

    message: str
    parameter: str | None = None


def undescribed(method: str, role: str) -> Refusal:
    """The refusal of a method that must know what every tensor of a layer does."""
    return Refusal(
        f"{method} does not know what {role!r} does in a layer. Use copies as new layers (presets llama_pro and"
        " copy_next), or passthrough, linear or slerp; or describe the family in models/families/"
    )


@dataclass(frozen=True)
class OutputTensor:
    """One output tensor of a block: its identity, its inputs, and how it comes about.

    Attributes:
        role: Its role in the layer (or its name outside of layers).
        name: Its name in the output.
        shape: Its sizes; the same for every source.
        dtype: safetensors code of the dtype it is written in.
        inputs: One stored tensor per source of its block.
        parameters: Resolved values of the method's tensor and block parameters.
        source_parameters: Resolved values of its source parameters, one mapping per source.
        spec: The family's description, where there is one.
        slot: Which of the block's layers it belongs to; 0 unless a block makes several.
        base: Which source is the base model.
        heads: The attention heads of the layer it belongs to, where its config says.
        between: For a method that learns: the two sources that its layer is put between.
        action: How it comes about.
        source: For actions on one source: which.
        quantization: How it is written, where that is quantised: the format, settings, dtypes and shapes of these
            parts, and for a copy their bytes.
    """

    role: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    inputs: tuple[StoredTensor, ...]
    parameters: Mapping[str, Any]
    source_parameters: tuple[Mapping[str, Any], ...]
    spec: TensorSpec | None = None
    slot: int = 0
    base: int | None = None
    heads: Heads | None = None
    between: tuple[int, int] | None = None
    action: Action = Action.COMPUTE
    source: int | None = None
    quantization: Quantization | None = None

    @property
    def computed(self) -> bool:
        """Whether the merge method computes it."""
        return self.action is Action.COMPUTE

    @property
    def nbytes(self) -> int:
        """Its size in the output in bytes."""
        return self.quantization.nbytes if self.quantization else tensor_bytes(self.dtype, self.shape)

    @property
    def written(self) -> tuple[WrittenTensor, ...]:
        """What it is in the output's files: itself, or its parts."""
        copied = self.action is Action.COPY
        if self.quantization is None:
            return (WrittenTensor(self.name, self.dtype, self.shape, None, self.stored if copied else None),)
        names, parts = self.quantization.named(self.name), self.quantization.parts
        return tuple(WrittenTensor(names[k], p.dtype, p.shape, k, p if copied else None) for k, p in parts.items())

    @property
    def stored(self) -> StoredTensor:
        """The stored tensor of an action on one source."""
        assert self.source is not None, f"{self.name}: {self.action} has no single source"
        return self.inputs[self.source]

    @property
    def nbytes_read(self) -> int:
        """Bytes that are read for it."""
        if self.action in CONSTANT or (self.computed and self.slot):  # what slot 0 reads serves all slots
            return 0
        if self.action in UNCHANGED:
            return self.stored.nbytes
        return sum(i.nbytes for i in self.inputs)


class FlatTensor(Protocol):
    """A vector of stored values: a tensor, or something that computes the runs of one as they are cut out."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def __getitem__(self, run: slice, /) -> torch.Tensor: ...


class Block(Protocol):
    """The inputs of one unit of work: a decoder layer (or several made at once, or one role of these), the embeddings,
    or the head.

    Attributes:
        outputs: The tensors to be made.
        base: Which source is the base model.
        memory: Bytes that may be alive at once; None for no limit.
    """

    outputs: Sequence[OutputTensor]
    base: int | None
    memory: int | None

    def read(self, role: str, source: int) -> torch.Tensor:
        """The tensor of a role from one source, in its stored dtype, on the device of the run."""
        ...

    def flat(self, role: str, source: int) -> FlatTensor:
        """The same as a vector, (n,), to be read one run after the other."""
        ...

    def generator(self, output: OutputTensor, source: int) -> torch.Generator:
        """Random numbers for one source of one output, of this run's seed: the same ones each time.

        The generator is on the CPU, whatever the run's device: draw there and move the numbers, so that every device
        gets the same ones.
        """
        ...


class SourceLayer(Mapping[str, "torch.Tensor"]):
    """One source of a block as a mapping from role to tensor that reads when asked."""

    def __init__(self, block: Block, source: int):
        self._block, self._source = block, source

    def __getitem__(self, role: str) -> torch.Tensor:
        return self._block.read(role, self._source)

    def __iter__(self) -> Iterator[str]:
        return (output.role for output in self._block.outputs if output.slot == 0)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class MergeMethod(ABC):
    """One merge method. Instances have no state.

    Attributes:
        name: As in a recipe, and the file's name.
        summary: One line for ``deus-merge methods``.
        reference: Where it was published.
        parameters: The parameters that a recipe can set.
        adds_base: Whether ``base_model`` joins the ``models`` of a recipe that do not name it.
        base: The role of the base model: ``required``; ``optional``, but one of the sources where a recipe names it;
            or ``ignored``: a source like the others.
        others: How many sources it takes besides the base model (all of them, where that is ignored): least and most.
        copies_one: Whether a slice with a single source is a copy of it.
        inserts: Whether it makes new layers: from pairs of sources, or in the gaps of a single source's range.
        tensorwise: Whether it computes each output from the inputs of its role alone, so that several can be computed
            at the same time.
        learns: Whether it inserts what it learns from all layers of a single source's model. These are then the sources
            of its blocks, one a layer, and are read one after the other; a block makes one role of every new layer that
            is learned from them alike, a slot each.
    """

    name: str
    summary: str
    reference: str
    parameters: tuple[Parameter, ...]
    adds_base = False
    base = "ignored"
    others: tuple[int, int | None] = (1, None)
    copies_one = False
    tensorwise = False
    inserts = False
    learns = False

    def check(self, outputs: Sequence[OutputTensor], sources: int) -> Refusal | None:
        """Why this many sources cannot be merged into these outputs; None when they can."""
        return None

    def warning(self, output: OutputTensor) -> str | None:
        """A message for the user about these settings; None in most cases."""
        return None

    @abstractmethod
    def decide(self, output: OutputTensor) -> Decision:
        """How this output comes about. Asked once, while planning."""

    @abstractmethod
    def merge(self, block: Block) -> Iterator[OutputChunk]:
        """Compute every output of the block whose action is ``COMPUTE``."""

    def workspace(self, outputs: Sequence[OutputTensor]) -> int:
        """Upper estimate of the bytes alive at once: the largest tensor in float32, once per source and three times
        for results."""
        sizes = (4 * math.prod(o.shape) * (len(o.source_parameters) + 3) for o in outputs)
        return max(sizes, default=0)

    def minimum_workspace(self, outputs: Sequence[OutputTensor]) -> int:
        """The same when `Block.memory` is short: less where buffers can be computed again, block by block."""
        return self.workspace(outputs)
