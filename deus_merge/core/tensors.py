"""The three shapes a tensor has on its way from a source to the output.

A `StoredTensor` lies in a source's file; a plan says with `methods.base.OutputTensor` how an output comes about; and an
`OutputChunk` holds values that were computed for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        COMPUTE: The merge method computes it.
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
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    derived: bool = False
    quantization: Quantization | None = None


@dataclass(frozen=True)
class Quantization:
    """How a quantised weight is stored: codes, and what gives the codes their meaning. They travel together.

    Attributes:
        format: The format: the name of a file of `checkpoint.formats`.
        parts: Stored tensors by their part in the format (``codes``, ``scales``); the codes first.
        settings: All else that the values depend on, as JSON data.
    """

    format: str
    parts: Mapping[str, StoredTensor]
    settings: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """The size of all parts in bytes."""
        return sum(part.nbytes for part in self.parts.values())


def part_name(part: str, weight: str, renamed: str) -> str:
    """The name of a part of a quantised weight, once the weight has another name.

    Args:
        part: The part's name: ``model.layers.3.mlp.up_proj.qweight``.
        weight: The weight's name: ``model.layers.3.mlp.up_proj.weight``.
        renamed: The weight's new name, which ends as the old one does.
    """
    begin = len(os.path.commonprefix((part, weight)))
    return renamed[: len(renamed) - (len(weight) - begin)] + part[begin:]


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
