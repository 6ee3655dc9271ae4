"""What a merge method is: parameters, what it needs, and a pure function from a block's tensors to new ones.

A method is one file in ``methods/`` that defines ``METHOD``. It never sees files: it gets a `Block`, which reads its
inputs on demand onto the device, and yields its outputs one by one, so that the caller can cast, write and free each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..core.parameters import Parameter
from ..models.family import Heads, TensorSpec

if TYPE_CHECKING:
    import torch


#: how many outputs of a tensorwise method are made at once, at most
AT_ONCE = 4


@dataclass(frozen=True)
class CopyOf:
    """An output tensor that is an input tensor, unchanged: it goes from file to file.

    Attributes:
        source: Which source of the block.
    """

    source: int


@dataclass(frozen=True)
class Zeros:
    """An output tensor of zeros: nothing is read."""


@dataclass(frozen=True)
class Compute:
    """An output tensor that the method makes."""


Origin = CopyOf | Zeros | Compute


@dataclass(frozen=True)
class TensorTask:
    """One output tensor of a block, as a method sees it.

    Attributes:
        role: Its role in the layer (or its name outside of layers).
        slot: Which of the block's layers it belongs to; 0 unless a block makes several.
        name: Its name in the output.
        spec: The family's description, where there is one.
        shape: Of the output; the same for every source.
        parameters: Resolved values of the method's tensor and block parameters.
        source_parameters: Resolved values of its source parameters, one mapping a source.
        base: Which source is the base model.
        heads: The attention heads of the layer it belongs to, where its config tells them.
        between: Of a method that learns: the two sources its layer is put between.
    """

    role: str
    slot: int
    name: str
    spec: TensorSpec | None
    shape: tuple[int, ...]
    parameters: Mapping[str, object]
    source_parameters: tuple[Mapping[str, object], ...]
    base: int | None = None
    heads: Heads | None = None
    between: tuple[int, int] | None = None


class Flat(Protocol):
    """A vector of stored values: a tensor, or what makes the runs of one as they are cut out."""

    dtype: torch.dtype
    device: torch.device

    def __getitem__(self, run: slice) -> torch.Tensor: ...


class Block(Protocol):
    """The inputs of one unit of work: a decoder layer (or several made at once), the embeddings, or the head."""

    tasks: Sequence[TensorTask]
    base: int | None  # which source is the base model
    memory: int | None  # bytes that may be alive at once while it is made; None for no limit

    def read(self, role: str, source: int) -> torch.Tensor:
        """The tensor of a role from one source, in its stored dtype, on the device of the merge."""

    def flat(self, role: str, source: int) -> Flat:
        """The same as a vector, (n,), for those who cut out one run after the other."""

    def generator(self, task: TensorTask, source: int) -> torch.Generator:
        """Random numbers of this run for one source of one output: the same ones each time it is asked."""


@dataclass(frozen=True)
class Made:
    """One finished output tensor, or a run of its elements.

    Attributes:
        task: Which output it is.
        tensor: Its values in the arithmetic's dtype; the caller casts once. None when there is only something to tell.
        diagnostics: What the report should say about it.
        start: Of a run: its first element in the flattened output.
    """

    task: TensorTask
    tensor: torch.Tensor | None
    diagnostics: Mapping[str, object] | None = None
    start: int | None = None


class MergeMethod(ABC):
    """One merge method. Instances are stateless.

    Attributes:
        name: As in a recipe, and the file's name.
        summary: One line for ``deus-merge methods``.
        reference: Where it was published.
        parameters: What a recipe can set.
        adds_base: Whether ``base_model`` joins the ``models`` of a recipe that do not name it.
        base: What the base model is to it: ``required``; ``optional``, but one of the sources where a recipe names it;
            or ``ignored``: a source like the others.
        others: How many sources it takes beside the base model (all of them, where that is ignored): least and most.
        inserts: Whether it makes new layers: from pairs of sources, or in the gaps of a single source's range.
        tensorwise: Whether it makes each output from the inputs of its role alone, so that several can be made at once.
        learns: Whether it inserts what it learns from all layers of a single source's model. These are then the sources
            of its block, one a layer, and are read one after the other; the block makes every new layer that is
            learned from them alike, a slot each.
    """

    name: str
    summary: str
    reference: str
    parameters: tuple[Parameter, ...]
    adds_base = False
    base = "ignored"
    others: tuple[int, int | None] = (1, None)
    tensorwise = False
    inserts = False
    learns = False

    def check(self, tasks: Sequence[TensorTask], sources: int) -> str | None:
        """What is wrong with merging this many sources into these outputs; None when it is fine."""
        return None

    def remark(self, task: TensorTask) -> str | None:
        """What the report must say about these settings; None in most cases."""
        return None

    @abstractmethod
    def origin(self, task: TensorTask) -> Origin:
        """How this output comes about; decided before any tensor is read."""

    @abstractmethod
    def merge(self, block: Block) -> Iterator[Made]:
        """Make every output whose origin is `Compute`."""

    def least_workspace(self, tasks: Sequence[TensorTask]) -> int:
        """What it can do with when `Block.memory` is short: less where buffers can be made again, piece by piece."""
        return self.workspace(tasks)

    def workspace(self, tasks: Sequence[TensorTask]) -> int:
        """Upper estimate of the bytes alive at once: the largest tensor in float32, once per source and three times
        for results."""
        sizes = (4 * math.prod(t.shape) * (len(t.source_parameters) + 3) for t in tasks)
        return max(sizes, default=0)
