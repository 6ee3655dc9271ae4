"""AWQ as AutoAWQ stores it for its GEMM kernel: four bits, with a zero point and a scale for each group of inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...core.tensors import Quantization, StoredTensor
from ._fused import with_experts
from ._packed import unpack
from .base import Format, Peek, Weight, part, refuse

if TYPE_CHECKING:
    import torch

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the codes of eight neighbouring outputs are


class Awq(Format):
    """AWQ, version gemm: value[o, i] = (qweight[i, o] - qzeros[group of i, o]) * scales[group of i, o].

    ``qweight`` is (in, out / 8) and ``qzeros`` (groups, out / 8): a word has the codes of eight neighbouring outputs,
    in an order of its own. Checkpoints without zero points store qzeros of 8.
    """

    name = "awq"
    summary = "AWQ, four bits, version gemm (AutoAWQ)"
    reference = "https://arxiv.org/abs/2306.00978; layout: github.com/casper-hansen/AutoAWQ, WQLinear_GEMM"
    exceptions = "modules_to_not_convert"

    def matches(self, section: Mapping[str, Any]) -> bool:
        return section.get("quant_method") == "awq"

    def weights(self, tensors: Mapping[str, StoredTensor], section: Mapping[str, Any], peek: Peek) -> Iterator[Weight]:
        group = section.get("group_size", section.get("q_group_size"))
        for name, tensor in tensors.items():
            module, _, last = name.rpartition(".")
            if last == "qweight":
                _check(section, tensor)
                part(tensors, name, name, dtypes=["I32"])
                if len(tensor.shape) != 2:
                    refuse(tensor, f"{name}: unexpected shape", expected="[in, out / 8]", got=list(tensor.shape))
                inputs, words = tensor.shape
                if group == -1:
                    groups = 1
                elif isinstance(group, int) and group > 0 and inputs % group == 0:
                    groups = inputs // group
                else:
                    refuse(tensor, f"{name}: group_size does not divide the inputs ({inputs})", got=group)
                zeros = part(tensors, f"{module}.qzeros", name, dtypes=["I32"], shapes=[(groups, words)])
                dtypes, shape = ["F16", "BF16", "F32"], (groups, 8 * words)
                scales = part(tensors, f"{module}.scales", name, dtypes=dtypes, shapes=[shape])
                parts = {"codes": tensor, "scales": scales, "zeros": zeros}
                yield Weight(f"{module}.weight", (8 * words, inputs), Quantization(self.name, parts, {}))
            elif last in ("qzeros", "scales"):
                part(tensors, f"{module}.qweight", name)

    def dequantize(
        self, weight: StoredTensor, parts: Mapping[str, torch.Tensor], start: int, stop: int
    ) -> torch.Tensor:
        import torch

        first, last = start // 8, -(-stop // 8)  # words of outputs; there are c = 8 * (last - first) outputs in them
        codes = unpack(parts["codes"][:, first:last], 4, _PLACES)  # (in, c)
        zeros = unpack(parts["zeros"][:, first:last], 4, _PLACES)  # (groups, c)
        scales = parts["scales"][:, 8 * first : 8 * last].to(torch.float32)  # (groups, c)
        grouped = codes.view(len(scales), len(codes) // len(scales), codes.shape[1])  # (groups, group_size, c)
        grouped.sub_(zeros[:, None]).mul_(scales[:, None])
        return codes[:, start - 8 * first : stop - 8 * first].T.contiguous()  # (out, in)

    def except_modules(
        self, section: Mapping[str, Any], modules: Sequence[str], default: Sequence[str], quantized: Sequence[str] = ()
    ) -> dict:
        return super().except_modules(section, with_experts(modules), default)


def _check(section: Mapping[str, Any], tensor: StoredTensor) -> None:
    """Refuse settings whose layout is another one, because of a weight."""
    for key in ("version", "format", "checkpoint_format"):
        value = section.get(key)
        if value is not None and str(value).lower() != "gemm":
            refuse(tensor, f"{tensor.name}: AWQ with {key} {value!r} is not supported", expected="gemm", got=value)
    bits = section.get("bits", section.get("w_bit"))
    if bits != 4:
        refuse(tensor, f"{tensor.name}: AWQ with bits {bits!r} is not supported", expected=4, got=bits)
    if section.get("backend") == "llm-awq":
        refuse(tensor, f"{tensor.name}: AWQ with backend 'llm-awq' is not supported", got="llm-awq")
    if rules := [rule for rule in section.get("dynamic") or () if not rule.startswith("-:")]:
        refuse(tensor, f"{tensor.name}: AWQ with dynamic {rules[0]!r} is not supported", got=rules[0])


FORMAT = Awq()
