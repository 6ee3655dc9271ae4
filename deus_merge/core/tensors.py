"""The three shapes a tensor has on its way from a source to the output.

A `StoredTensor` lies in a source's file; a plan says with `methods.base.OutputTensor` how an output comes about; and an
`OutputChunk` holds values that were computed for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Action(str, Enum):
    """How an output tensor comes about. The plan decides it once; tables, manifest and report use these words.

    Attributes:
        COPY: The bytes of one stored tensor, from file to file.
        DERIVE: One source's tensor as the source makes it when it is read (an adapter applied, rows of another
            tokenizer), in the same dtype.
        CAST: One source's tensor in another dtype.
        ZEROS: Zeros; nothing is read.
        ONES: Ones; nothing is read.
        ALIGN: One source's tensor, aligned to another source.
        COMPUTE: The merge method computes it; in a finished output also what ``calibrate`` has set.
    """

    COPY = "copy"
    DERIVE = "derive"
    CAST = "cast"
    ZEROS = "zeros"
    ONES = "ones"
    ALIGN = "align"
    COMPUTE = "compute"

    def __str__(self) -> str:
        return self.value


#: Actions that read nothing.
CONSTANT = frozenset({Action.ZEROS, Action.ONES})

#: Actions that leave the values of one source as they are, but for rounding to another dtype.
UNCHANGED = frozenset({Action.COPY, Action.DERIVE, Action.CAST})


@dataclass(frozen=True)
class StoredTensor:
    """Where one stored tensor lies.

    Attributes:
        name: Its name.
        dtype: safetensors dtype code: ``"BF16"``.
        shape: Its sizes; ``()`` for a scalar.
        file: The file it is in.
        offset: Its first byte, counted from the file's start.
        nbytes: Its size in bytes.
        derived: Whether its bytes are in no file but are computed when it is read; ``file`` is then what it is computed
            from, and ``offset`` means nothing.
        quantization: How a quantised weight is stored. Such a weight is derived (its values are dequantised when it is
            read), ``nbytes`` is the size of all its parts, and ``dtype`` that of the model it stands for.
        remote: Gives the bytes of a file that is on no disk of this machine; ``file`` is then only its name. None for
            a file that can be opened.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    derived: bool = False
    quantization: Quantization | None = None
    remote: RemoteBytes | None = field(default=None, compare=False, repr=False)


class RemoteBytes(Protocol):
    """The bytes of a file on another machine. Pickles."""

    def stream(self, begin: int, end: int) -> AbstractContextManager[Iterator[memoryview]]:
        """Bytes ``begin`` to ``end`` in order, in pieces of any size. Requests are made ahead until it is left.

        Raises:
            CheckpointError: the file has changed, or cannot be read any more.
            MachineError: the connection is lost.
        """
        ...


@dataclass(frozen=True)
class Quantization:
    """How a quantised weight is stored: codes, and what gives the codes their meaning. They travel together.

    Attributes:
        format: The format: the name of a file of `checkpoint.formats`.
        parts: Stored tensors by their part in the format (``codes``, ``scales``); the codes first.
        settings: All else that the values depend on, as JSON data.
        weight: The name of the weight in its checkpoint, which the names of the parts are made from.
    """

    format: str
    parts: Mapping[str, StoredTensor]
    settings: Mapping[str, Any]
    weight: str = ""

    @property
    def nbytes(self) -> int:
        """The size of all parts in bytes."""
        return sum(part.nbytes for part in self.parts.values())

    def named(self, weight: str) -> dict[str, str]:
        """The names of the parts, once the weight has another name.

        Args:
            weight: The new name, which ends as the old one does.

        Returns:
            Part -> name: ``model.layers.2.up_proj.qweight`` becomes ``model.layers.3.up_proj.qweight`` for the weight
            ``model.layers.3.up_proj.weight``.
        """
        names = {}
        for label, part in self.parts.items():
            whole = part.name.startswith(self.weight)
            begin = len(self.weight if whole else os.path.commonprefix((part.name, self.weight)))
            names[label] = weight[: len(weight) - (len(self.weight) - begin)] + part.name[begin:]
        return names


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor of an output's files: an output tensor, or a part of one that is written quantised.

    Attributes:
        name: Its name.
        dtype: safetensors dtype code.
        shape: Its sizes.
        part: Which part of a quantised weight it is; None for a tensor as it is.
        stored: The stored tensor whose bytes it gets, where the output is a copy.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    part: str | None = None
    stored: StoredTensor | None = None


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """What the report says about an output. Methods add fields of their own.

    Attributes:
        source: The source that was aligned, where ``align:`` of a slice did it.
    """

    role: str
    source: int | None = None


@dataclass(frozen=True)
class OutputChunk:
    """Values of one output tensor: all of them, or a run of its elements.

    Attributes:
        role: The output's role in its block.
        values: In the dtype of the arithmetic, or, once cast, in the output's; None where there are only diagnostics.
        slot: Which of the block's layers the output belongs to.
        start: The first element of a run in the flattened output; None for a whole tensor.
        diagnostics: How it came about.
    """

    role: str
    values: torch.Tensor | None
    slot: int = 0
    start: int | None = None
    diagnostics: Diagnostics | None = None
