"""compressed-tensors: what llm-compressor writes. FP8 and INT8 weights, and INT4 and NVFP4 weights in packed words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...core.tensors import Quantization, StoredTensor
from ...core.units import torch_dtype
from ._blocks import in_blocks
from ._compressed_tensors_groups import Group, group_of, groups, inner
from ._packed_codes import looked_up, pack_columns, unpack_columns, unpack_e2m1, unpack_rows
from .base import Format, Peek, Weight, part, refuse

if TYPE_CHECKING:
    import torch

_FLOATS = ("F32", "BF16", "F16")
_LABELS = {
    "weight_scale": "scales", "weight_zero_point": "zeros", "weight_g_idx": "order",
    "weight_global_scale": "scale_of_scales", "weight_shape": "shape",
}  # fmt: skip
#: measured while the model ran, not computed from weights
_ACTIVATIONS = tuple(
    f"{which}_{what}" for which in ("input", "output") for what in ("scale", "zero_point", "global_scale")
)


class CompressedTensors(Format):
    name = "compressed_tensors"
    summary = "compressed-tensors: FP8, INT8, packed INT4 and INT8, NVFP4; one or several in a model"
    reference = "https://github.com/vllm-project/compressed-tensors"
    exceptions = "ignore"
    quantizes = True
    computed = ("codes", "scales", "shape")

    def matches(self, section: Mapping[str, Any]) -> bool:
        found = inner(section)
        methods = (section.get("quant_method"), found.get("quant_method"))
        known = any(method in ("compressed-tensors", "sparseml") for method in methods)  # the second at first
        return known or "config_groups" in found and methods == (None, None)

    def weights(self, tensors: Mapping[str, StoredTensor], section: Mapping[str, Any], peek: Peek) -> Iterator[Weight]:
        first = next(iter(tensors.values()), None)
        among = groups(section, first and first.file.parent / "config.json")
        taken: set[str] = set()
        for name, codes in tensors.items():
            module, _, last = name.rpartition(".")
            if last == "weight_packed" or last == "weight" and codes.dtype in ("I8", "F8_E4M3"):
                weight = _weight(module, codes, tensors, among, peek)
                taken.update(part.name for part in weight.quantization.parts.values())
                yield weight
        for name, tensor in tensors.items():
            if name.rpartition(".")[2] in _LABELS and name not in taken:
                refuse(tensor, f"{name} belongs to no quantised weight", hint="the checkpoint is incomplete")

    def dequantize(
        self, weight: StoredTensor, parts: Mapping[str, torch.Tensor], start: int, stop: int
    ) -> torch.Tensor:
        import torch

        quantization = weight.quantization
        assert quantization is not None
        (out, into), settings = weight.shape, quantization.settings
        height, width = settings["block"]
        codes = parts["codes"][start:stop]  # (r, in) or packed
        if settings["stored"] == "int32":
            values = unpack_columns(codes, settings["bits"], into)  # (r, in)
        elif settings["stored"] == "fp4":
            values = unpack_e2m1(codes)  # (r, in)
        elif codes.dtype == torch.int8:
            values = codes.to(torch.float32)  # (r, in)
        else:
            every = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()  # (256,): the value of each code
            values = looked_up(codes.view(torch.uint8), every)  # (r, in)
        rows = torch.arange(start, stop) // height  # (r,): of the grid of scales
        grid = (-(-out // height), -(-into // width))
        if (order := parts.get("order")) is not None and not bool((order == -1).any()):
            if bool(((order < 0) | (order >= grid[1])).any()):
                refuse(
                    quantization.parts["order"], f"{quantization.parts['order'].name} names groups that do not exist"
                )
            order, width = order.to(torch.int64), 1  # (in,): columns have no blocks
        else:
            order = None

        def of_columns(shared: torch.Tensor) -> torch.Tensor:
            return shared if order is None else shared[:, order]  # (r, groups) or (r, in)

        if (zeros := parts.get("zeros")) is not None:
            if settings["packed_zeros"]:
                zeros = unpack_rows(zeros, settings["bits"], start, stop)  # (r, groups)
            else:
                zeros = zeros.view(grid)[rows].to(torch.float32)  # (r, groups)
            in_blocks(torch.Tensor.sub_, values, of_columns(zeros), width)
        scales = parts["scales"].view(grid)[rows].to(torch.float32)  # (r, groups)
        if (overall := parts.get("scale_of_scales")) is not None:
            scales = scales / overall.to(torch.float32)  # stored as a divisor, (1,)
        in_blocks(torch.Tensor.mul_, values, of_columns(scales), width)
        return values

    def quantize(self, values: torch.Tensor, like: StoredTensor) -> dict[str, torch.Tensor]:
        import torch
        from torch.nn.functional import pad

        quantization = like.quantization
        assert quantization is not None
        parts, settings = quantization.parts, quantization.settings
        (out, into), (height, width), float_ = like.shape, settings["block"], parts["codes"].dtype == "F8_E4M3"
        top = 448.0 if float_ else 2.0 ** (settings["bits"] - 1) - 1
        bottom, half_range = (-448.0, 448.0) if float_ else (-top - 1, top + 0.5)
        blocks = pad(values.abs(), (0, -into % width, 0, -out % height))  # (out, in), rounded up to whole blocks
        blocks = blocks.unflatten(1, (-1, width)).amax(2).unflatten(0, (-1, height)).amax(1)  # (grid)
        scales = (blocks / half_range).to(torch_dtype(parts["scales"].dtype))  # (grid)
        scales = torch.where(scales == 0, torch.finfo(scales.dtype).eps, scales)  # as the library does
        rows, columns = torch.arange(out) // height, torch.arange(into) // width  # (out,), (in,)
        codes = values / scales.to(torch.float32)[rows][:, columns]  # (out, in)
        codes = codes.clamp_(bottom, top) if float_ else codes.round_().clamp_(bottom, top)
        packed = settings["stored"] == "int32"
        made = {
            "codes": pack_columns(codes, settings["bits"]) if packed else codes.to(torch_dtype(parts["codes"].dtype))
        }
        made["scales"] = scales.view(parts["scales"].shape)
        if "shape" in parts:
            made["shape"] = torch.tensor(like.shape, dtype=torch_dtype(parts["shape"].dtype))
        return made

    def refusal(self, like: StoredTensor) -> str | None:
        assert like.quantization is not None
        fp4 = like.quantization.settings["stored"] == "fp4"
        return "rounding to NVFP4 is not defined here" if fp4 else super().refusal(like)

    def note(self, modules: Sequence[str]) -> str | None:
        if any(".experts" in module for module in modules):
            return (
                "transformers cannot load experts in floating point beside packed ones; quantize_new: true packs those"
                " of new layers"
            )
        return None

    def zero_codes(self, quantization: Quantization) -> bool:
        return quantization.settings["stored"] != "int32"  # packed codes have an offset

    def except_modules(
        self, section: Mapping[str, Any], modules: Sequence[str], default: Sequence[str], quantized: Sequence[str] = ()
    ) -> dict:
        """As `Format.except_modules`. The modules of ``default`` are not added: loaders of this format leave out only
        what the section lists. Experts that a loader has as one module are listed with all that is below them."""
        found = inner(section)
        below = [rf"re:{re.escape(module)}\..*" for module in modules if module.rpartition(".")[2] == "experts"]
        names = dict.fromkeys([*(found.get(self.exceptions) or ()), *modules, *below])
        changed = {**found, self.exceptions: list(names)}
        return changed if found is section else {**section, "quantization_config": changed}


def _weight(
    module: str,
    codes: StoredTensor,
    tensors: Mapping[str, StoredTensor],
    among: Sequence[Group],
    peek: Peek,
) -> Weight:
    """The weight of a module.

    Args:
        module: Its name.
        codes: Its codes.
        tensors: All stored tensors.
        among: The groups of the config.
        peek: Reads ``weight_shape``, where scales do not give the number of columns: in every other case a checkpoint
            with thousands of experts would be opened one small read at a time.
    """
    group = group_of(module, among)
    if group is None:
        refuse(codes, f"{codes.name} is quantised, but no group of the config targets {module}")
    packed = codes.name.endswith("_packed")
    dtype = {"int32": "I32", "fp4": "U8", "floats": ""}.get(group.stored, "I8" if group.kind == "int" else "F8_E4M3")
    if codes.dtype != dtype or packed != (group.stored != "numbers"):
        refuse(
            codes, f"{codes.name} does not fit {group.key} of the config", expected=_describe(group), got=codes.dtype
        )
    if len(codes.shape) != 2:
        refuse(codes, f"{codes.name} is not a matrix", expected="2 axes", got=list(codes.shape))

    def own(name: str, dtypes: Sequence[str], *shapes: tuple[int, ...]) -> StoredTensor:
        return part(tensors, f"{module}.{name}", codes.name, dtypes=dtypes, shapes=shapes or None)

    parts = {"codes": codes}
    fp4 = group.stored == "fp4"
    parts["scales"] = scales = own("weight_scale", ("F8_E4M3",) if fp4 else _FLOATS)
    out, into = codes.shape[0], codes.shape[1] * (2 if fp4 else 1)
    if group.stored == "int32":
        parts["shape"] = shape = own("weight_shape", ("I64", "I32"), (2,))
        into = scales.shape[-1] * (group.block[1] or 0) if group.strategy == "group" and scales.shape else 0
        rows, into = (out, into) if group.strategy == "group" else map(int, peek(shape.name).tolist())
        if rows != out or -(-into * group.bits // 32) != codes.shape[1] or into < 1:
            refuse(codes, f"{codes.name} does not fit {shape.name} and {scales.name}", got=list(codes.shape))
    height, width = min(group.block[0] or out, out), min(group.block[1] or into, into)
    if group.block[1] and group.strategy != "block" and into % group.block[1]:
        expected = f"a multiple of {group.block[1]} columns"
        refuse(codes, f"{codes.name} cannot be cut into groups", expected=expected, got=into)
    grid = (-(-out // height), -(-into // width))
    flat = {"tensor": [(), (1,)], "channel": [(out,)]}.get(group.strategy, [])
    own("weight_scale", (scales.dtype,), *flat, grid)
    packed_zeros = group.stored == "int32" and group.strategy != "tensor" and not group.symmetric
    if not group.symmetric or f"{module}.weight_zero_point" in tensors:
        if packed_zeros:
            parts["zeros"] = own("weight_zero_point", ("I32",), (-(-out * group.bits // 32), grid[1]))
        else:
            parts["zeros"] = own("weight_zero_point", ("F8_E4M3",) if group.kind == "float" else ("I8",), *flat, grid)
    if group.strategy == "group" and (group.ordered or f"{module}.weight_g_idx" in tensors):
        parts["order"] = own("weight_g_idx", ("I32", "I64"), (into,))
    if fp4:
        parts["scale_of_scales"] = own("weight_global_scale", ("F32",), (1,), ())
    parts |= {name: found for name in _ACTIVATIONS if (found := tensors.get(f"{module}.{name}"))}
    settings = {"stored": group.stored, "bits": group.bits, "block": [height, width], "packed_zeros": packed_zeros}
    return Weight(f"{module}.weight", (out, into), Quantization("compressed_tensors", parts, settings))


def _describe(group: Group) -> str:
    return f"{group.format}, {group.kind}, {group.bits} bits"


FORMAT = CompressedTensors()
