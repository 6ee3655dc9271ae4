"""Sizes in bytes and tensor dtypes, as people and files spell them. Importing this module does not import torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

from .errors import DeusMergeError, nearest

if TYPE_CHECKING:
    import torch

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*$", re.IGNORECASE)
_POWER = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}

#: safetensors dtype code -> bits of one element
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
#: safetensors dtype code -> bytes of one element; 1 for those of less than a byte
ITEMSIZE = {code: max(1, bits // 8) for code, bits in BITS.items()}

#: dtype as a recipe or config.json spells it -> safetensors dtype code; the dtypes a merge may write
FLOAT_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def parse_size(text: str | int) -> int:
    """Bytes of ``"5GB"`` (decimal), ``"8GiB"`` (binary) or a plain number.

    Raises:
        DeusMergeError: not a size, or less than one byte.
    """
    match = _SIZE.match(str(text))
    if match is None:
        raise DeusMergeError("not a size", expected="a number with a unit, like 5GB or 8GiB", got=repr(text))
    number, unit, binary = match.groups()
    size = int(Decimal(number) * (1024 if binary else 1000) ** _POWER[unit.upper()])
    if size < 1:
        raise DeusMergeError("a size must be positive", expected="at least 1 byte", got=repr(text))
    return size


def format_size(size: int | float) -> str:
    """``2_200_000_000`` -> ``"2.20 GB"`` (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def format_count(count: int) -> str:
    """``7_240_000_000`` -> ``"7.24 B"``: thousands, millions, billions."""
    number = float(count)
    for unit in ("", " k", " M", " B"):
        if number < 1000:
            return f"{number:.0f}" if not unit else f"{number:.2f}{unit}"
        number /= 1000
    return f"{number:.2f} T"


def format_seconds(seconds: float) -> str:
    """``4000`` -> ``"1 h 7 min"``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def dtype_code(name: str) -> str:
    """The safetensors code of a recipe's dtype: ``"bfloat16"`` -> ``"BF16"`` (the prefix ``"torch."`` is allowed).

    Raises:
        DeusMergeError: not a floating dtype a merge can write.
    """
    plain = str(name).removeprefix("torch.")
    if plain not in FLOAT_DTYPES:
        raise DeusMergeError(
            "unknown dtype", expected=" | ".join(FLOAT_DTYPES), got=repr(name), hint=nearest(plain, FLOAT_DTYPES)
        )
    return FLOAT_DTYPES[plain]


def dtype_name(code: str) -> str:
    """The inverse of `dtype_code`, for any safetensors dtype: ``"BF16"`` -> ``"bfloat16"``."""
    return _TORCH.get(code) or {"F4": "float4_e2m1", "F6_E2M3": "float6_e2m3", "F6_E3M2": "float6_e3m2"}[code]


def tensor_bytes(code: str, shape: Sequence[int]) -> int:
    """The size of a tensor in bytes. Elements of less than a byte lie next to each other."""
    return math.prod(shape) * BITS[code] // 8


def torch_dtype(code: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype code: uint8, the bytes as they are, for elements of less than a byte."""
    import torch

    return getattr(torch, _TORCH.get(code, "uint8"))


def stored_dtypes() -> dict[torch.dtype, str]:
    """Every torch dtype of real numbers that a safetensors file can hold -> its code."""
    return {torch_dtype(code): code for code in _TORCH if code != "C64"}


def promoted(codes: Sequence[str]) -> str:
    """The narrowest dtype that holds values of all of these float dtypes: ``F16`` and ``BF16`` need ``F32``."""
    widest = max(codes, key=ITEMSIZE.__getitem__)
    return widest if all(c == widest or ITEMSIZE[c] < ITEMSIZE[widest] for c in codes) else "F32"


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of any dtype and shape holds no NaN and no infinity."""
    return bool(all_finite(tensor))


def all_finite(tensor: torch.Tensor) -> torch.Tensor:
    """`is_finite` as a () bool tensor on the tensor's device, so that several can be read at once."""
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    wide = tensor if tensor.element_size() > 1 else tensor.to(torch.float32)  # float8 has no order
    return torch.isfinite(torch.stack(torch.aminmax(wide))).all()  # NaN is both ends, and this is faster
