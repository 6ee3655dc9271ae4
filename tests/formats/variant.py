"""One kind of quantised checkpoint that the tests of formats make: a module of ``makers`` has one or more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Variant:
    """A kind of quantised checkpoint.

    Attributes:
        model: The tiny float model that it is made from: a name of `tiny_float_models.MODELS`.
        make: Quantises: (folder of the float model, new folder). Writes what the format's own library writes.
        values: The weights of a quantised folder by their names in the float model, in float32, as the format's own
            library (or, without one here, the format's definition in code of its own) dequantises them.
        exact: Whether ours must equal these bit for bit; else to one rounding of the model's dtype.
        loads: Whether transformers loads such a folder on a CPU.
        mixes: Whether it also does where some layers are in floating point.
    """

    model: str
    make: Callable[[Path, Path], None]
    values: Callable[[Path], Mapping[str, torch.Tensor]]
    exact: bool = True
    loads: bool = True
    mixes: bool = True
