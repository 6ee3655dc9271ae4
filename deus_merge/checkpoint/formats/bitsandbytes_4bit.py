"""bitsandbytes NF4 and FP4: a table of sixteen values, and a scale for each run of codes (QLoRA)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...core.tensors import Quantization, StoredTensor
from ._fused import with_fused
from ._packed_codes import looked_up
from .base import Format, Peek, Weight, part, refuse, scale_problem

if TYPE_CHECKING:
    import torch

_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_PART = re.compile(rf"(.+)\.(?:{'|'.join(_PARTS)}|quant_state\.bitsandbytes__\w+)")
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # numbers of codes with one scale
_STATE_BYTES = 1 << 16  # of a weight's settings; they take some hundred
#: codes are bytes, but may be stored as another dtype's (``bnb_4bit_quant_storage``, for FSDP)
_STORAGE = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}


class BitsAndBytes4Bit(Format):
    """NF4 and FP4: value = quant_map[code] * absmax[block].

    Blocks are runs of the flattened weight, two codes a byte, the first in the upper bits. With double quantisation
    absmax is stored in eight bits: absmax = nested_quant_map[code] * nested_absmax[block of blocks] + nested_offset.
    """

    name = "bitsandbytes_4bit"
    summary = "bitsandbytes NF4 and FP4, with and without double quantisation (QLoRA)"
    reference = "https://arxiv.org/abs/2305.14314, section 3"
    exceptions = "llm_int8_skip_modules"
    transposes = True

    def matches(self, section: Mapping[str, Any]) -> bool:
        # configs from before the key quant_method only say load_in_4bit
        return section.get("quant_method") in (None, "bitsandbytes") and section.get("load_in_4bit") is True

    def weights(self, tensors: Mapping[str, StoredTensor], section: Mapping[str, Any], peek: Peek) -> Iterator[Weight]:
        found = {match[1]: name for name in tensors if (match := _PART.fullmatch(name))}
        for name, known in found.items():
            codes = part(tensors, name, known, dtypes=list(_STORAGE))
            states = [f"{name}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
            stored = [state for state in states if state in tensors]
            if len(stored) != 1:
                got = ", ".join(stored) or "none"
                refuse(codes, f"{name} needs one of these tensors", expected=" | ".join(states), got=got)
            state = part(tensors, stored[0], name, dtypes=["U8"])
            if len(state.shape) != 1 or state.nbytes > _STATE_BYTES:
                refuse(state, f"{state.name} does not hold settings in JSON", got=list(state.shape))
            settings = _settings(state, bytes(peek(state.name).tolist()))
            shape = tuple(settings["shape"])
            count = math.prod(shape)
            length = -(-count // (2 * _STORAGE[codes.dtype]))
            part(tensors, name, state.name, shapes=[(length, 1)])
            blocks = -(-count // settings["blocksize"])
            parts = {"codes": codes}
            nested = "nested_offset" in settings
            dtypes = ["U8"] if nested else ["F32"]
            parts["absmax"] = part(tensors, f"{name}.absmax", name, dtypes=dtypes, shapes=[(blocks,)])
            parts["quant_map"] = part(tensors, f"{name}.quant_map", name, dtypes=["F32"], shapes=[(16,)])
            if nested:
                runs = -(-blocks // settings["nested_blocksize"])
                for label, size in (("nested_absmax", runs), ("nested_quant_map", 256)):
                    parts[label] = part(tensors, f"{name}.{label}", name, dtypes=["F32"], shapes=[(size,)])
            for label in _PARTS:
                if label not in parts and f"{name}.{label}" in tensors:
                    refuse(state, f"{name}.{label} is stored, but {state.name} has no nested_offset")
            parts["quant_state"] = state
            del settings["shape"]
            yield Weight(name, shape, Quantization(self.name, parts, settings))

    def dequantize(
        self, weight: StoredTensor, parts: Mapping[str, torch.Tensor], start: int, stop: int
    ) -> torch.Tensor:
        import torch

        assert weight.quantization is not None
        settings = weight.quantization.settings
        block = settings["blocksize"]
        row = math.prod(weight.shape[1:])
        first, last = start * row // block, -(-stop * row // block)  # the blocks that have codes of these rows
        absmax = parts["absmax"][first:last]  # (blocks,)
        if "nested_absmax" in parts:
            runs = torch.arange(first, last) // settings["nested_blocksize"]
            absmax = parts["nested_quant_map"][absmax.to(torch.int32)] * parts["nested_absmax"][runs]
            absmax += settings["nested_offset"]
        codes = parts["codes"].flatten().view(torch.uint8)[first * block // 2 : last * block // 2]
        table = parts["quant_map"]
        pairs = torch.cartesian_prod(table, table)  # (256, 2): the two values of a byte
        values = looked_up(codes, pairs)
        short = (last - first) * block - len(values)
        if short:  # the weight's last block is not full
            values = torch.nn.functional.pad(values, (0, short))
        values.view(-1, block).mul_(absmax[:, None])
        return values[start * row - first * block : stop * row - first * block].view(-1, *weight.shape[1:])

    def scales(self, quantization: Quantization) -> Sequence[str]:
        return ["nested_absmax" if "nested_absmax" in quantization.parts else "absmax"]

    def check(self, weight: StoredTensor, parts: Mapping[str, torch.Tensor]) -> tuple[str, str] | None:
        assert weight.quantization is not None
        for label in ("quant_map", "nested_quant_map"):
            problem = scale_problem(parts[label]) if label in parts else None
            if problem and problem != "holds zeros":  # zero is one of the values
                return weight.quantization.parts[label].name, problem
        return super().check(weight, parts)

    def except_modules(
        self, section: Mapping[str, Any], modules: Sequence[str], default: Sequence[str], quantized: Sequence[str] = ()
    ) -> dict:
        return super().except_modules(section, with_fused(modules), default)


def _settings(state: StoredTensor, text: bytes) -> dict[str, Any]:
    """The settings of a weight, from the JSON text that bitsandbytes stores in a tensor.

    Raises:
        CheckpointError: a setting is missing, or its value is unknown.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        refuse(state, f"{state.name} does not hold settings in JSON", got=text[:80])
    nested = any(key.startswith("nested_") for key in found)
    known = {
        "quant_type": lambda value: value == state.name.rpartition("__")[2],
        "blocksize": lambda value: _is_size(value) and value in _BLOCKS,
        "shape": lambda value: isinstance(value, list) and bool(value) and all(_is_size(size) for size in value),
    } | (
        {
            "nested_blocksize": _is_size,
            "nested_dtype": lambda value: value == "float32",
            "nested_offset": lambda value: isinstance(value, float) and math.isfinite(value),
        }
        if nested
        else {}
    )
    for key, fits in known.items():
        if not fits(found.get(key)):
            refuse(state, f"{state.name}: unknown or missing {key}", got=found.get(key))
    return {key: found[key] for key in known if key != "nested_dtype"}


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


FORMAT = BitsAndBytes4Bit()
