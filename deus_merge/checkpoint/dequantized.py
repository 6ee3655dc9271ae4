"""A checkpoint of quantised weights, read as the model it stands for: a weight with its scales is one float tensor."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..core.errors import CheckpointError, DeusMergeError
from ..core.tensors import Quantization, StoredTensor
from ..core.units import dtype_code
from .formats import _conv1d
from .formats.base import HOLDS_ZEROS, Format, refuse
from .formats.registry import formats
from .quantized import is_cache_scale, quantization, quantized_tensors
from .reader import Checkpoint
from .tensor_source import FileStamp, TensorSource

if TYPE_CHECKING:
    import torch

#: keys of sections that list modules which are not quantised
_LISTS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "llm_int8_skip_modules")
_BLOCK_BYTES = 1 << 20  # of float32 values that are dequantised at once: little enough for the cache


def dequantized(stored: TensorSource) -> TensorSource:
    """A source with its quantised weights as float tensors; itself if it has none, or nobody described their format.

    Raises:
        CheckpointError: a part of a quantised weight is missing or does not fit.
    """
    section = quantization(stored.config)
    if section is None or not isinstance(stored, Checkpoint):
        return stored
    format_ = next((f for f in formats().values() if f.matches(section)), None)
    return stored if format_ is None else DequantizedSource(stored, format_)


class DequantizedSource:
    """A checkpoint (`TensorSource`) whose quantised weights are read in float32. Pickles.

    `StoredTensor.quantization` of such a weight has its parts: a copy takes these from file to file.

    Args:
        stored: The checkpoint.
        format_: The format of its weights.

    Attributes:
        stored: The checkpoint, with every stored tensor under its own name.
        format: The format of its weights.

    Raises:
        CheckpointError: a part of a weight is missing or does not fit, or a tensor is of no weight.
    """

    def __init__(self, stored: TensorSource, format_: Format):
        self.stored, self.format = stored, format_
        self.where, self.folders, self.files = stored.where, stored.folders, stored.files
        self.side_files, self.provenance, self.config = stored.side_files, stored.provenance, stored.config
        self.fingerprint = stored.fingerprint
        section = quantization(stored.config)
        assert section is not None
        _check_names(section, f"{stored.where}/config.json")
        said = _said_dtype(stored.config)
        weights: dict[str, StoredTensor] = {}  # by the name of the stored tensor whose place they take
        parts: set[str] = set()
        for stored_weight in format_.weights(stored.tensors, section, stored.read):
            weight = _conv1d.as_in_model(stored_weight, stored.config) if format_.transposes else stored_weight
            found_parts = weight.quantization.parts.values()
            codes = next(iter(found_parts))
            weights[codes.name] = StoredTensor(
                weight.name,
                said or next((part.dtype for part in found_parts if part.dtype in ("F16", "BF16")), "BF16"),
                weight.shape,
                codes.file,
                0,
                weight.quantization.nbytes,
                derived=True,
                quantization=replace(weight.quantization, weight=weight.name),
            )
            parts.update(part.name for part in found_parts)
        found: dict[str, StoredTensor] = {}
        for name, tensor in stored.tensors.items():
            if name in weights or name not in parts:
                seen = weights.get(name, tensor)
                if seen.name in found:
                    refuse(tensor, f"{seen.name} is stored both quantised and as it is")
                found[seen.name] = seen
        plain = {n: tensor for n, tensor in found.items() if tensor.quantization is None and not is_cache_scale(n)}
        for name, partner in quantized_tensors(plain, stored.config).items():
            beside = "" if partner == name else f", together with {partner}"
            refuse(plain[name], f"{name}{beside}, is part of no {format_.name} weight that is known")
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(found)

    def __getstate__(self) -> dict:  # read-only views of mappings do not pickle
        return self.__dict__ | {"tensors": dict(self.tensors)}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, tensors=MappingProxyType(state["tensors"]))

    def read(self, name: str) -> torch.Tensor:
        weight = self.tensors.get(name)
        if weight is None or weight.quantization is None:
            return self.stored.read(name)
        return self.slice(name, 0, weight.shape[0])

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of `read`, in float32."""
        weight = self.tensors.get(name)
        if weight is None or weight.quantization is None:
            return self.stored.slice(name, start, stop)
        return self.rows(name)(start, stop)

    def rows(self, name: str) -> Callable[[int, int], torch.Tensor]:
        """`slice` of one quantised weight, for many slices: its parts are mapped, and its scales checked, only once.

        Raises:
            CheckpointError: its scales hold NaN or infinity.
        """
        weight, format_ = self.tensors[name], self.format
        assert weight.quantization is not None
        parts = {label: self.stored.read(part.name) for label, part in weight.quantization.parts.items()}
        problem = format_.check(weight, parts)
        if problem and problem[1] != HOLDS_ZEROS:
            raise CheckpointError(
                f"{problem[0]} {problem[1]}: {name} cannot be dequantised",
                where=weight.file,
                expected="finite scales",
                hint="download the file again, or use the original model",
            )
        transposed = _conv1d.is_transposed(weight)
        row = 4 * (weight.shape[0] if transposed else math.prod(weight.shape[1:]))
        block = max(1, _BLOCK_BYTES // max(1, row))  # rows, as they are stored

        def rows(start: int, stop: int) -> torch.Tensor:
            import torch

            if not 0 <= start <= stop <= weight.shape[0]:
                got, expected = (start, stop), f"within {weight.shape}"
                refuse(weight, f"tensor {name!r} does not have these rows", expected=expected, got=got)
            if transposed:
                return _conv1d.dequantize(format_, weight, parts, start, stop, block)
            if stop - start <= block:
                return format_.dequantize(weight, parts, start, stop)
            values = torch.empty((stop - start, *weight.shape[1:]), dtype=torch.float32)
            for at in range(start, stop, block):
                end = min(at + block, stop)
                values[at - start : end - start] = format_.dequantize(weight, parts, at, end)
            return values

        return rows

    def zero_scales(self, name: str) -> str | None:
        """The stored tensor of a weight's scales that holds zeros, so that values are lost; None in most cases."""
        weight = self.tensors[name]
        if weight.quantization is None:
            return None
        parts = {label: self.stored.read(part.name) for label, part in weight.quantization.parts.items()}
        problem = self.format.check(weight, parts)
        return problem[0] if problem and problem[1] == HOLDS_ZEROS else None

    def prefetch(self, names: Iterable[str]) -> None:
        stored = []
        for name in names:
            weight = self.tensors.get(name)
            quantized = weight.quantization if weight else None
            stored += [part.name for part in quantized.parts.values()] if quantized else [name]
        self.stored.prefetch(stored)

    def stamp(self) -> list[FileStamp]:
        return self.stored.stamp()

    def root(self, name: str) -> tuple[TensorSource, str]:
        return self.stored.root(name)

    def bound(self, results: Mapping[str, TensorSource]) -> DequantizedSource:
        return self

    def workspace(self, name: str, minimum: bool = False) -> int:
        weight = self.tensors[name]
        if weight.quantization is None:
            return self.stored.workspace(name, minimum)
        return 4 * math.prod(weight.shape) + 4 * _BLOCK_BYTES


def _check_names(section: Mapping[str, Any], where: str) -> None:
    """Check what a section says of modules by their names.

    Raises:
        CheckpointError: a list is no list of names, or rules are no mapping from patterns to settings.
    """
    for key, value in section.items():
        wrong = None
        if key in _LISTS and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            wrong = "a list of names"
        elif key == "dynamic" and value and not (isinstance(value, Mapping) and all(map(_is_rule, value.items()))):
            wrong = "patterns of names, each with settings"
        if wrong and value is not None:
            raise CheckpointError(
                f"malformed {key!r} in the section about quantisation", where=where, expected=wrong, got=repr(value)
            )
        if key == "quantization_config" and isinstance(value, Mapping):  # in an old compression_config
            _check_names(value, where)


def _is_rule(rule: tuple[str, object]) -> bool:
    pattern, settings = rule
    try:
        re.compile(pattern.removeprefix("-:").removeprefix("+:"))
    except re.error:
        return False
    return not settings or isinstance(settings, Mapping)


def quantized_share(weights: Iterable[tuple[Quantization | None, Sequence[int]]]) -> dict[str, dict[str, float]]:
    """How much of some weights is quantised.

    Args:
        weights: How each is stored, and its shape.

    Returns:
        Format -> ``weights`` (how many) and ``bits`` (of one element, all parts included).
    """
    count, elements, size = Counter[str](), Counter[str](), Counter[str]()
    for quantized, shape in weights:
        if quantized is not None:
            count[quantized.format] += 1
            elements[quantized.format] += math.prod(shape)
            size[quantized.format] += quantized.nbytes
    return {name: {"weights": n, "bits": round(8 * size[name] / elements[name], 2)} for name, n in count.items()}


def float_shapes(source: TensorSource) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors but those that are quantised in a way that nobody described."""
    unknown = quantized_tensors(source.tensors, source.config)
    return {name: tensor.shape for name, tensor in source.tensors.items() if name not in unknown}


def _said_dtype(config: Mapping) -> str | None:
    """The dtype of the model that quantised weights stand for, as its config says; None where it says none. Then it is
    that of a part in floating point, or bfloat16."""
    sections = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    said = next((s[key] for s in sections for key in ("dtype", "torch_dtype") if isinstance(s.get(key), str)), None)
    try:
        return dtype_code(said or "")
    except DeusMergeError:
        return None
