"""GPTQ as AutoGPTQ and GPTQModel store it: 2, 4 or 8 bits, and groups of inputs with a zero point and a scale."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...core.errors import CheckpointError
from ...core.tensors import Quantization, StoredTensor
from ._fused import with_fused
from ._packed import unpack
from .base import Format, Peek, Weight, part, refuse

if TYPE_CHECKING:
    import torch

_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # the number one in every place of a word, by bits
#: settings that change the layout or the meaning of weights -> values that do not
_PLAIN = {"pack_dtype": ("int32",), "is_marlin_format": (False,), "adapter": (), "rotation": ()}


class Gptq(Format):
    """GPTQ: value[o, i] = (qweight[i, o] - zero[g_idx[i], o]) * scales[g_idx[i], o].

    ``qweight`` is (in / pack, out), a word having the codes of ``pack`` = 32 / bits neighbouring inputs; ``qzeros`` is
    (groups, out / pack). ``g_idx`` gives each input's group, in any order (act-order). In checkpoint format ``gptq``,
    words of zero points are stored minus one in every place, with borrow between places, as GPTQModel writes and reads
    them (a zero point of 0 occurs without ``sym`` only); in ``gptq_v2`` as they are. A ``g_idx`` of zeros means groups
    in their order.
    """

    name = "gptq"
    summary = "GPTQ, 2, 4 and 8 bits, formats gptq and gptq_v2, act-order (AutoGPTQ, GPTQModel)"
    reference = "https://arxiv.org/abs/2210.17323; layout: github.com/ModelCloud/GPTQModel, TorchQuantLinear"
    exceptions = "dynamic"
    transposes = True

    def matches(self, section: Mapping[str, Any]) -> bool:
        return section.get("quant_method") == "gptq"

    def weights(self, tensors: Mapping[str, StoredTensor], section: Mapping[str, Any], peek: Peek) -> Iterator[Weight]:
        for name, tensor in tensors.items():
            module, _, last = name.rpartition(".")
            if last == "qweight":
                minus = _minus(section, tensor)
                part(tensors, name, name, dtypes=["I32"])
                if len(tensor.shape) != 2:
                    refuse(
                        tensor, f"{name}: unexpected shape", expected="[in * bits / 32, out]", got=list(tensor.shape)
                    )
                rule = _rule(section, module)
                bits = rule.get("bits", section.get("bits"))
                if not isinstance(bits, int) or bits not in _ONES:
                    refuse(tensor, f"{name}: GPTQ with bits {bits!r} is not supported", expected="2 | 4 | 8", got=bits)
                inputs, outputs = tensor.shape[0] * 32 // bits, tensor.shape[1]
                if outputs * bits % 32:
                    refuse(tensor, f"{name}: its zero points fill no whole words", got=list(tensor.shape))
                size = rule.get("group_size", section.get("group_size"))
                if not isinstance(size, int) or size == 0 or size < -1:
                    refuse(tensor, f"{name}: unknown group_size", expected="-1 or a positive number", got=size)
                groups = 1 if size == -1 else -(-inputs // size)
                words = (groups, outputs * bits // 32)
                parts = {
                    "codes": tensor,
                    "scales": part(tensors, f"{module}.scales", name, dtypes=["F16", "BF16", "F32"],
                                   shapes=[(groups, outputs)]),
                    "zeros": part(tensors, f"{module}.qzeros", name, dtypes=["I32"], shapes=[words]),
                    "groups": part(tensors, f"{module}.g_idx", name, dtypes=["I32", "I64"], shapes=[(inputs,)]),
                }  # fmt: skip
                settings = {"bits": bits, "zeros_minus_one": minus, "group": inputs if size == -1 else size}
                yield Weight(f"{module}.weight", (outputs, inputs), Quantization(self.name, parts, settings))
            elif last in ("qzeros", "scales", "g_idx"):
                part(tensors, f"{module}.qweight", name)

    def dequantize(
        self, weight: StoredTensor, parts: Mapping[str, torch.Tensor], start: int, stop: int
    ) -> torch.Tensor:
        import torch

        assert weight.quantization is not None
        bits = weight.quantization.settings["bits"]
        pack = 32 // bits
        scales, groups = parts["scales"][:, start:stop].to(torch.float32).T, parts["groups"]  # (rows, groups), (in,)
        if bool(((groups < 0) | (groups >= scales.shape[1])).any()):
            tensor = weight.quantization.parts["groups"]
            got = f"{int(groups.min())} to {int(groups.max())}"
            raise CheckpointError(
                f"{tensor.name} has groups that do not exist",
                where=tensor.file,
                expected=f"0 to {scales.shape[1] - 1}",
                got=got,
                hint="download the file again, or use the original model",
            )
        if scales.shape[1] > 1 and not bool(groups.any()):
            groups = torch.arange(len(groups)) // weight.quantization.settings["group"]
        first, last = start // pack, -(-stop // pack)  # words of zero points
        words = parts["zeros"][:, first:last]  # (groups, last - first)
        if weight.quantization.settings["zeros_minus_one"]:
            words = words + _ONES[bits]
        zeros = unpack(words, bits)[:, start - pack * first : stop - pack * first].T  # (rows, groups)
        values = unpack(parts["codes"][:, start:stop].T, bits)  # (rows, in)
        values.sub_(zeros.index_select(1, groups))
        return values.mul_(scales.index_select(1, groups))

    def except_modules(
        self, section: Mapping[str, Any], modules: Sequence[str], default: Sequence[str], quantized: Sequence[str] = ()
    ) -> dict:
        """Rules of ``dynamic`` for GPTQModel and vLLM; transformers only reads which modules *are* quantised.

        Modules that loaders leave out by themselves, such as ``lm_head``, need no rule: ``dynamic`` does not change
        them.
        """
        rules = {f"-:^{re.escape(name)}$": {} for name in with_fused(modules)}
        changed = {**section, self.exceptions: rules | (section.get(self.exceptions) or {})}  # the first match decides
        if quantized:
            changed["modules_in_block_to_quantize"] = [list(quantized)]
        return changed


def _minus(section: Mapping[str, Any], tensor: StoredTensor) -> bool:
    """Whether zero points are stored minus one. Refuses settings of other layouts, because of a weight."""
    for key, plain in _PLAIN.items():
        value = section.get(key)
        if value is not None and value not in plain:
            expected = " | ".join(map(str, plain)) or None
            refuse(tensor, f"{tensor.name}: GPTQ with {key} {value!r} is not supported", expected=expected, got=value)
    key = "format" if section.get("checkpoint_format") is None else "checkpoint_format"
    value = section.get(key) or "gptq"
    if value not in ("gptq", "gptq_v2"):
        refuse(tensor, f"{tensor.name}: GPTQ with {key} {value!r} is not supported", expected="gptq | gptq_v2",
               got=value)  # fmt: skip
    return value == "gptq"


def _rule(section: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """What the first rule of ``dynamic`` that matches a quantised module says of it (a rule that begins with ``-:``
    does not: such modules are not quantised)."""
    for pattern, rule in (section.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("+:"), module):
            return rule or {}
    return {}


FORMAT = Gptq()
