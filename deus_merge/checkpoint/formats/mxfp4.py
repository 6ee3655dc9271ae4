"""MXFP4 as gpt-oss stores its experts: 4-bit floats with a power of two for every 32 of them.

``gate_up_proj_blocks`` (E, out, in / 32, 16) holds two values in a byte, the first in the lower half, and
``gate_up_proj_scales`` (E, out, in / 32) exponents. The model's weight is the transpose: ``gate_up_proj`` (E, in, out).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...core.tensors import Quantization, StoredTensor
from ._packed_codes import looked_up, pairs_of
from .base import Format, Peek, Weight, part, refuse

if TYPE_CHECKING:
    import torch

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; 8 to 15 are negative
_BIAS, _NAN = 127, 255  # of exponents
_ROWS = 512  # outputs of an expert that are converted at once


class Mxfp4(Format):
    name = "mxfp4"
    summary = "4-bit floats with a power of two for every 32 (gpt-oss)"
    reference = "Open Compute Project 2023, Microscaling Formats (MX) Specification 1.0"
    exceptions = "modules_to_not_convert"
    quantizes = True
    computed = ("codes", "scale")

    def matches(self, section: Mapping[str, Any]) -> bool:
        return section.get("quant_method") == "mxfp4"

    def weights(self, tensors: Mapping[str, StoredTensor], section: Mapping[str, Any], peek: Peek) -> Iterator[Weight]:
        for name, tensor in tensors.items():
            if name.endswith("_proj_scales"):
                part(tensors, f"{name.removesuffix('_scales')}_blocks", name)
            if not name.endswith("_proj_blocks"):
                continue
            stem, shape = name.removesuffix("_blocks"), tensor.shape
            part(tensors, name, stem, dtypes=("U8",))
            if len(shape) != 4 or shape[3] != 16 or 0 in shape:
                refuse(tensor, f"{name}: unexpected shape", expected="(experts, out, in / 32, 16)", got=list(shape))
            scales = part(tensors, f"{stem}_scales", name, dtypes=("U8",), shapes=(shape[:3],))
            quantization = Quantization(self.name, {"codes": tensor, "scale": scales}, {})
            yield Weight(stem, (shape[0], 32 * shape[2], shape[1]), quantization)

    def dequantize(
        self, weight: StoredTensor, parts: Mapping[str, torch.Tensor], start: int, stop: int
    ) -> torch.Tensor:
        import torch

        _, inputs, outputs = weight.shape
        pairs = pairs_of(torch.tensor([*_VALUES, *(-value for value in _VALUES)]))  # (256, 2)
        values = torch.empty((stop - start, inputs, outputs), dtype=torch.float32)
        for expert in range(start, stop):
            for at in range(0, outputs, _ROWS):
                rows = looked_up(parts["codes"][expert, at : at + _ROWS], pairs)  # (o, in / 32, 32)
                rows.mul_(_powers(parts["scale"][expert, at : at + _ROWS])[..., None])
                values[expert - start, :, at : at + _ROWS] = rows.view(-1, inputs).T
        return values

    def check(self, weight: StoredTensor, parts: Mapping[str, torch.Tensor]) -> tuple[str, str] | None:
        assert weight.quantization is not None
        if bool((parts["scale"] == _NAN).any()):
            return weight.quantization.parts["scale"].name, "holds NaN"
        return None

    def note(self, modules: Sequence[str]) -> str | None:
        if any(module.endswith(".experts") for module in modules):
            return (
                "vLLM loads no experts in floating point beside MXFP4 ones (transformers does); quantize_new: true"
                " writes new ones as MXFP4"
            )
        return None

    def quantize(self, values: torch.Tensor, like: StoredTensor) -> dict[str, torch.Tensor]:
        """Round to nearest even. The scale is the smallest power of two with which no value exceeds the largest code.

        Reference: ``downcast_to_mxfp`` of triton_kernels, which transformers quantises with.
        """
        import torch

        experts, inputs, outputs = values.shape
        middles = torch.tensor([(a + b) / 2 for a, b in zip(_VALUES, _VALUES[1:], strict=False)])  # (7,)
        codes = torch.empty((experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        exponents = torch.empty((experts, outputs, inputs // 32), dtype=torch.uint8)
        for expert in range(experts):
            for at in range(0, outputs, _ROWS):
                rows = values[expert, :, at : at + _ROWS].T.contiguous().view(-1, inputs // 32, 32)  # (o, in / 32, 32)
                mantissa, exponent = torch.frexp(rows.abs().amax(-1) / _VALUES[-1])  # mantissa in [0.5, 1), or 0
                exponent = exponent - (mantissa == 0.5).int() + _BIAS
                exponent = torch.where(mantissa == 0, 0, exponent.clamp(1, _NAN - 1)).to(torch.uint8)
                scaled = rows / _powers(exponent)[..., None]  # (o, in / 32, 32)
                below, up = (torch.bucketize(scaled.abs(), middles, right=right) for right in (False, True))
                code = torch.where(below % 2 == 0, below, up) + 8 * torch.signbit(scaled)  # ties to even codes
                codes[expert, at : at + _ROWS] = (code[..., 0::2] + 16 * code[..., 1::2]).to(torch.uint8)
                exponents[expert, at : at + _ROWS] = exponent
        return {"codes": codes, "scale": exponents}


def _powers(exponents: torch.Tensor) -> torch.Tensor:
    """Two to the power of stored exponents, in float32, down to 2 ** -127."""
    import torch

    return torch.ldexp(torch.ones(exponents.shape), exponents.int() - _BIAS)


FORMAT = Mxfp4()
