"""bitsandbytes LLM.int8(): int8 codes with the largest magnitude of each row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...core.tensors import Quantization, StoredTensor
from ._fused import with_fused
from .base import Format, Peek, Weight, part, refuse

if TYPE_CHECKING:
    import torch

_OVER_127 = 7.874015718698502e-3  # 1 / 127, as bitsandbytes writes it
_SMALLEST = 1e-36  # of a new weight's row maxima: 127 / _SMALLEST is finite in float32
_LAYOUTS = {1: "col32", 2: "col_turing", 3: "col_ampere"}  # of old versions, for GPUs


class BitsAndBytes8Bit(Format):
    """LLM.int8(): value = code * SCB[row] / 127.

    Activations' outliers, which the arithmetic of the loader treats apart, do not matter to the weights.
    """

    name = "bitsandbytes_8bit"
    summary = "bitsandbytes LLM.int8(): int8 with a scale for each row"
    reference = "https://arxiv.org/abs/2208.07339, section 3"
    exceptions = "llm_int8_skip_modules"
    transposes = True
    quantizes = True
    computed = ("codes", "scales", "layout")

    def matches(self, section: Mapping[str, Any]) -> bool:
        # configs from before the key quant_method only say load_in_8bit
        return section.get("quant_method") in (None, "bitsandbytes") and section.get("load_in_8bit") is True

    def weights(self, tensors: Mapping[str, StoredTensor], section: Mapping[str, Any], peek: Peek) -> Iterator[Weight]:
        for name, tensor in tensors.items():
            module, _, last = name.rpartition(".")
            if last == "weight" and tensor.dtype == "I8" and len(tensor.shape) == 2:
                scales = part(tensors, f"{module}.SCB", name, dtypes=["F32"], shapes=[tensor.shape[:1]])
                parts = {"codes": tensor, "scales": scales}
                if (layout := f"{module}.weight_format") in tensors:  # old checkpoints, whose layout is row, lack it
                    parts["layout"] = part(tensors, layout, name, dtypes=["U8"], shapes=[()])
                    if code := int(peek(layout)):
                        got = _LAYOUTS.get(code, code)
                        refuse(parts["layout"], f"{layout}: unsupported layout of codes", expected="row (0)", got=got)
                yield Weight(name, tensor.shape, Quantization(self.name, parts, {}))
            elif last == "SCB":
                part(tensors, f"{module}.weight", name, dtypes=["I8"])

    def dequantize(
        self, weight: StoredTensor, parts: Mapping[str, torch.Tensor], start: int, stop: int
    ) -> torch.Tensor:
        import torch

        values = parts["codes"][start:stop].to(torch.float32)  # (rows, in)
        return values.mul_(parts["scales"][start:stop, None]).mul_(_OVER_127)

    def quantize(self, values: torch.Tensor, like: StoredTensor) -> dict[str, torch.Tensor]:
        """Codes and row maxima as bitsandbytes computes them, in float32 (it rounds the weight to float16 first).

        A row of zeros, for which bitsandbytes divides by zero, gets a tiny scale.
        """
        import torch

        scales = values.abs().amax(dim=1).clamp_min_(_SMALLEST)  # (out,)
        codes = (values * (127.0 / scales)[:, None]).round_().to(torch.int8)  # (out, in)
        parts = {"codes": codes, "scales": scales}
        assert like.quantization is not None
        if "layout" in like.quantization.parts:
            parts["layout"] = torch.zeros((), dtype=torch.uint8)
        return parts

    def except_modules(
        self, section: Mapping[str, Any], modules: Sequence[str], default: Sequence[str], quantized: Sequence[str] = ()
    ) -> dict:
        return super().except_modules(section, with_fused(modules), default)


FORMAT = BitsAndBytes8Bit()
