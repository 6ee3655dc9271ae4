"""FP8: 8-bit floats times a scale for each block, for each row, or for the whole tensor.

DeepSeek-V3 and Qwen3-FP8 store a scale for each block of 128 x 128 values as ``weight_scale_inv``, which values are
multiplied with whatever its name says; blocks at the edges may be smaller. Other files have one scale for each tensor
(``weight_scale``), fbgemm one for each row. Experts in one tensor have the scales of all experts in one tensor, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...core.tensors import Quantization, StoredTensor
from ...core.units import torch_dtype
from ._blocks import in_blocks
from ._packed_codes import looked_up
from .base import Format, Peek, Weight, part, refuse, scale_problem

if TYPE_CHECKING:
    import torch

_CODES = ("F8_E4M3", "F8_E5M2")
_FLOATS = ("F32", "BF16", "F16")
_EXPERT = re.compile(r"\.experts\.\d+(?:\..+)?$")
_BAND = 1 << 22  # elements that are quantised at once, at least one row of blocks
#: what these keys of the section may say; other keys do not change values
_KNOWN: dict[str, tuple[object, ...]] = {
    "fmt": (None, "e4m3", "e5m2", "float8_e4m3fn", "float8_e5m2"), "activation_scheme": (None, "dynamic", "static"),
    "scale_fmt": (None, "float", "ue8m0"), "expert_dtype": (None, "fp8"),
}  # fmt: skip


class Fp8(Format):
    name = "fp8"
    summary = "8-bit floats with a scale for each block, row or tensor (DeepSeek-V3, Qwen3-FP8, fbgemm, ModelOpt)"
    reference = "DeepSeek-AI 2024, DeepSeek-V3 Technical Report (arXiv:2412.19437), section 3.3"
    exceptions = "modules_to_not_convert"
    quantizes = True
    computed = ("codes", "scale")

    def matches(self, section: Mapping[str, Any]) -> bool:
        method = section.get("quant_method")
        return method in ("fp8", "mxfp8", "fbgemm_fp8") or (method == "modelopt" and section.get("quant_algo") == "FP8")

    def weights(self, tensors: Mapping[str, StoredTensor], section: Mapping[str, Any], peek: Peek) -> Iterator[Weight]:
        for name, tensor in tensors.items():
            if tensor.dtype in _CODES:
                yield _weight(tensors, tensor, section)
            elif name.endswith(("_scale_inv", ".weight_scale")):
                codes = name.removesuffix("_inv").removesuffix("_scale")
                part(tensors, codes, name, dtypes=_CODES)

    def dequantize(
        self, weight: StoredTensor, parts: Mapping[str, torch.Tensor], start: int, stop: int
    ) -> torch.Tensor:
        import torch

        *stack, rows, columns = weight.shape
        height, width = _block(weight)
        scales = parts["scale"].reshape(*stack, -(-rows // height), -(-columns // width))  # (E, r / height, c / width)
        every = (
            torch.arange(256, dtype=torch.uint8).view(parts["codes"].dtype).float()
        )  # (256,): the value of each code
        values = looked_up(parts["codes"][start:stop].view(torch.uint8), every)  # (e, r, c) or (r, c)
        scales, first, last = (scales[start:stop], 0, rows) if stack else (scales, start, stop)
        of_rows = torch.arange(first, last) // height  # (r,): rows of the grid
        in_blocks(torch.Tensor.mul_, values, _decoded(scales.index_select(-2, of_rows)), width)
        return values

    def check(self, weight: StoredTensor, parts: Mapping[str, torch.Tensor]) -> tuple[str, str] | None:
        assert weight.quantization is not None
        problem = scale_problem(_decoded(parts["scale"]))
        return (weight.quantization.parts["scale"].name, problem) if problem else None

    def quantize(self, values: torch.Tensor, like: StoredTensor) -> dict[str, torch.Tensor]:
        """Round to nearest even, with each block's largest value at the largest code."""
        import torch

        quantization = like.quantization
        assert quantization is not None
        *_, rows, columns = like.shape
        height, width = _block(like)
        stored = quantization.parts["scale"]
        dtype = torch_dtype(quantization.parts["codes"].dtype)
        codes = torch.empty(values.shape, dtype=dtype)
        scales = torch.empty((values.numel() // (rows * columns), -(-rows // height), -(-columns // width)))
        power = quantization.settings["power"]
        band = max(1, _BAND // (height * columns))  # rows of blocks
        matrices = values.reshape(-1, rows, columns), codes.view(-1, rows, columns)
        for matrix, into, grid in zip(*matrices, scales, strict=True):
            for at in range(0, len(grid), band):
                block = matrix[at * height : (at + band) * height].float()  # (r, c)
                size = len(block)
                block = torch.nn.functional.pad(block, (0, -columns % width, 0, -size % height))
                block = block.view(-1, height, grid.shape[1], width)  # (r / height, height, c / width, width)
                scale, factor = _scale(block.abs().amax((1, 3)), torch.finfo(dtype).max, stored.dtype, power)
                block = (block * factor[:, None, :, None]).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
                into[at * height : at * height + size] = block.flatten(2).flatten(0, 1)[:size, :columns].to(dtype)
                grid[at : at + band] = scale  # (r / height, c / width)
        if stored.dtype in ("F8_E8M0", "U8"):
            exponents = scales.to(torch.float8_e8m0fnu).reshape(stored.shape)
            return {"codes": codes, "scale": exponents.view(torch.uint8) if stored.dtype == "U8" else exponents}
        return {"codes": codes, "scale": scales.to(torch_dtype(stored.dtype)).reshape(stored.shape)}

    def except_modules(
        self, section: Mapping[str, Any], modules: Sequence[str], default: Sequence[str], quantized: Sequence[str] = ()
    ) -> dict:
        """Loaders read ``modules_to_not_convert`` or ``ignored_layers``, of ModelOpt's sections ``ignore`` or
        ``exclude_modules``: all that are there are extended. They know a layer's experts as one module, ``..experts``.
        """
        modules = list(dict.fromkeys(_EXPERT.sub(".experts", module) for module in modules))
        keys = ("ignore", "exclude_modules")
        if section.get("quant_method") != "modelopt":
            keys = (self.exceptions, "ignored_layers")
        present = [key for key in keys if section.get(key) is not None] or keys[:1]
        lists = {key: [*(default if section.get(key) is None else section[key]), *modules] for key in present}
        return {**section, **{key: list(dict.fromkeys(names)) for key, names in lists.items()}}


def _weight(tensors: Mapping[str, StoredTensor], codes: StoredTensor, section: Mapping[str, Any]) -> Weight:
    for key, known in _KNOWN.items():
        if section.get(key) not in known:
            expected = " | ".join(str(value) for value in known if value is not None)
            refuse(codes, f"unknown {key!r} in the section about quantisation", expected=expected, got=section[key])
    name, method = codes.name, section["quant_method"]
    if len(codes.shape) not in (2, 3) or 0 in codes.shape:
        refuse(codes, f"{name}: unexpected shape", expected="(out, in) or (experts, out, in)", got=list(codes.shape))
    inverse = method in ("fp8", "mxfp8") and (f"{name}_scale_inv" in tensors or f"{name}_scale" not in tensors)
    grids = _grids(codes, section, inverse)
    dtypes = (*_FLOATS, "F8_E8M0", "U8") if _powers(section) else (*_FLOATS, "F8_E8M0")
    scale = part(tensors, f"{name}_scale{'_inv' * inverse}", name, dtypes=dtypes, shapes=list(grids))
    parts = {"codes": codes, "scale": scale}
    stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"  # of its other parts
    shapes = ((), (1,), *([codes.shape[:1]] if len(codes.shape) == 3 else []))
    for label in ("activation", "input", "output"):
        if f"{stem}{label}_scale" in tensors:
            parts[label] = part(tensors, f"{stem}{label}_scale", name, dtypes=_FLOATS, shapes=shapes)
    if section.get("activation_scheme") == "static" and not parts.keys() & {"activation", "input"}:
        part(tensors, f"{stem}{'activation' if inverse else 'input'}_scale", name)
    settings = {"block": list(grids[scale.shape]), "power": _powers(section) or scale.dtype not in _FLOATS}
    return Weight(name, codes.shape, Quantization("fp8", parts, settings))


def _powers(section: Mapping[str, Any]) -> bool:
    """Whether the section says that scales are powers of two."""
    return section["quant_method"] == "mxfp8" or section.get("scale_fmt") == "ue8m0"


def _grids(codes: StoredTensor, section: Mapping[str, Any], inverse: bool) -> dict[tuple[int, ...], tuple[int, int]]:
    """The shapes that the scales of a weight may have -> the sizes of a block.

    Args:
        codes: The weight as it is stored.
        section: The section of the config.
        inverse: Whether the name of the scales ends in ``_inv``.
    """
    *stack, rows, columns = codes.shape
    if section["quant_method"] == "fbgemm_fp8":
        return {(*stack, rows, 1): (1, columns)}
    grids: dict[tuple[int, ...], tuple[int, int]] = {}
    if not inverse or section.get("weight_block_size") is None:  # one scale for each matrix
        shapes = ((*stack,), (*stack, 1, 1)) if stack else ((), (1,), (1, 1))
        grids = dict.fromkeys(shapes, (rows, columns))
        if stack and rows % 2 == 0:
            grids[(*stack, 2, 1)] = (rows // 2, columns)  # of gate and up
    # without the key, transformers takes blocks of 128 x 128
    size = section.get("weight_block_size", (1, 32) if section["quant_method"] == "mxfp8" else (128, 128))
    if inverse and size is not None:
        if not isinstance(size, list | tuple) or [type(n) is int and n > 0 for n in size] != [True, True]:
            refuse(codes, "malformed 'weight_block_size'", expected="two positive integers", got=size)
        grids[(*stack, -(-rows // size[0]), -(-columns // size[1]))] = (min(size[0], rows), min(size[1], columns))
    return grids


def _block(weight: StoredTensor) -> tuple[int, int]:
    """Rows and columns of a block."""
    assert weight.quantization is not None
    height, width = weight.quantization.settings["block"]
    return height, width


def _decoded(scales: torch.Tensor) -> torch.Tensor:
    """Scales of any dtype in float32; bytes are exponents of two."""
    import torch

    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).to(torch.float32)


def _scale(largest: torch.Tensor, limit: float, dtype: str, power: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of blocks as they are stored, in float32, and the factors that values are quantised with.

    Args:
        largest: The largest absolute value of each block; blocks of zeros get the scale 1.
        limit: The largest code.
        dtype: The dtype of the stored scales.
        power: Whether scales are powers of two; they are rounded up.
    """
    import torch

    factor = torch.where(largest > 1e-30, limit / largest, 1.0)
    scale = 1.0 / factor
    if power:
        mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    elif dtype != "F32":
        scale = scale.to(torch_dtype(dtype)).float()
        scale = torch.where(scale > 0, scale, 1.0)  # too small for the dtype
    return scale, factor if dtype == "F32" and not power else 1.0 / scale


FORMAT = Fp8()
