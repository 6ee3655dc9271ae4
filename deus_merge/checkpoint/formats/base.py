"""The interface of a format of quantised weights: which stored tensors make a weight, and which values they stand for.

A format is one file in this folder that defines ``FORMAT``. It never opens files: it gets the headers of a checkpoint
and the section of its config, and later the parts of one weight, mapped from their files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from ...core.errors import CheckpointError
from ...core.tensors import Quantization, StoredTensor

if TYPE_CHECKING:
    import torch

#: reads a small stored tensor by name, while a checkpoint is opened
Peek = Callable[[str], "torch.Tensor"]


HOLDS_ZEROS = "holds zeros"


@dataclass(frozen=True)
class Weight:
    """A quantised weight of a checkpoint.

    Attributes:
        name: Its name in the model: ``model.layers.3.mlp.up_proj.weight``, whatever its parts are called.
        shape: Its sizes in the model, (out, in) for a linear layer.
        quantization: Its parts.
    """

    name: str
    shape: tuple[int, ...]
    quantization: Quantization


class Format(ABC):
    """One format. Instances have no state.

    Attributes:
        name: The file's name.
        summary: One line for ``deus-merge methods``.
        reference: Where the format is defined.
        exceptions: The key of the config's section that lists the modules which are not quantised.
        quantizes: Whether `quantize` is defined.
        transposes: Whether weights of transformers' ``Conv1D`` are stored as their transposes.
        computed: For such a format: the parts that it computes from values. Others are measured on activations.
    """

    name: str
    summary: str
    reference: str
    exceptions: str
    quantizes = False
    transposes = False
    computed: tuple[str, ...] = ()

    @abstractmethod
    def matches(self, section: Mapping[str, Any]) -> bool:
        """Whether the section of a config that says how weights are quantised speaks of this format."""

    @abstractmethod
    def weights(self, tensors: Mapping[str, StoredTensor], section: Mapping[str, Any], peek: Peek) -> Iterator[Weight]:
        """Every quantised weight of a checkpoint, with all stored tensors that travel with it (activation scales, too).

        Args:
            tensors: All stored tensors by name.
            section: The section of the config.
            peek: Reads a small tensor, for formats that store shapes in tensors.

        Raises:
            CheckpointError: a part is missing, or its dtype or shape does not fit; the message names the tensor.
        """

    @abstractmethod
    def dequantize(
        self, weight: StoredTensor, parts: Mapping[str, torch.Tensor], start: int, stop: int
    ) -> torch.Tensor:
        """Rows ``start`` to ``stop`` (half-open) of a weight's first axis, in float32, in new memory.

        Args:
            weight: The weight: shape and quantization.
            parts: Its parts as they are stored, mapped from their files (reading them takes no memory; they must not
                be written to).
            start, stop: The rows.
        """

    def check(self, weight: StoredTensor, parts: Mapping[str, torch.Tensor]) -> tuple[str, str] | None:
        """What is odd about the scales of a weight: the name of the stored tensor, and ``holds NaN``, ``holds
        infinity`` or ``holds zeros``; None in most cases."""
        quantization = weight.quantization
        assert quantization is not None
        for label in self.scales(quantization):
            if problem := scale_problem(parts[label]):
                return quantization.parts[label].name, problem
        return None

    def scales(self, quantization: Quantization) -> Sequence[str]:
        """The parts that values are multiplied with or divided by."""
        return [label for label in quantization.parts if label.startswith("scale")]

    def refusal(self, like: StoredTensor) -> str | None:
        """Why a new weight cannot get the format of a weight of the base; None where it can.

        Args:
            like: The weight of the base.
        """
        assert like.quantization is not None
        if not self.quantizes:
            return f"new weights cannot be quantised to {self.name}"
        other = [part.name for label, part in like.quantization.parts.items() if label not in self.computed]
        return f"{other[0]} is not computed from weights" if other else None

    def note(self, modules: Sequence[str]) -> str | None:
        """What is known of loaders that cannot load these modules in floating point beside quantised ones."""
        return None

    def zero_codes(self, quantization: Quantization) -> bool:
        """Whether the codes of zeros are bytes of zero, in a format that quantises."""
        return True

    def quantize(self, values: torch.Tensor, like: StoredTensor) -> dict[str, torch.Tensor]:
        """The parts of a new weight.

        Args:
            values: The weight in float32, of ``like``'s shape.
            like: A weight of the base, whose format and settings the new one gets.

        Returns:
            The parts, in the dtypes and shapes of ``like``'s.

        Raises:
            CheckpointError: the format does not quantise; a plan asks `refusal` first.
        """
        refuse(like, f"{like.name}: {self.refusal(like) or f'{self.name} does not quantise'}")

    def except_modules(
        self, section: Mapping[str, Any], modules: Sequence[str], default: Sequence[str], quantized: Sequence[str] = ()
    ) -> dict:
        """A config's section that also says that these modules are not quantised.

        Args:
            section: The section.
            modules: The names of the modules.
            default: Modules that loaders leave out by themselves as long as the section lists no module.
            quantized: The names of all modules that are quantised, for loaders that read this list instead.
        """
        listed = section.get(self.exceptions)
        names = dict.fromkeys([*(default if listed is None else listed), *modules])
        return {**section, self.exceptions: list(names)}


def scale_problem(scales: torch.Tensor) -> str | None:
    """What is odd about scales of any dtype and shape, in words."""
    import torch

    values = scales.to(torch.float32)
    if bool(torch.isnan(values).any()):
        return "holds NaN"
    if bool(torch.isinf(values).any()):
        return "holds infinity"
    return HOLDS_ZEROS if bool((values == 0).any()) else None


def part(
    tensors: Mapping[str, StoredTensor],
    name: str,
    weight: str,
    *,
    dtypes: Sequence[str] | None = None,
    shapes: Sequence[tuple[int, ...]] | None = None,
) -> StoredTensor:
    """A stored tensor that is part of a quantised weight.

    Args:
        tensors: All stored tensors.
        name: The name of the part.
        weight: The stored tensor it belongs to, for the message.
        dtypes: The safetensors dtype codes that it may have; None for any.
        shapes: The shapes that it may have; None for any.

    Raises:
        CheckpointError: it is missing, or has another dtype or shape.
    """
    found = tensors.get(name)
    if found is None:
        refuse(tensors[weight], f"{name}, which belongs to {weight}, is missing", hint="the checkpoint is incomplete")
    if dtypes is not None and found.dtype not in dtypes:
        refuse(found, f"{name}: unexpected dtype", expected=" | ".join(dtypes), got=found.dtype)
    if shapes is not None and found.shape not in shapes:
        expected = " | ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        refuse(found, f"{name} does not fit {weight}", expected=expected, got=list(found.shape))
    return found


def refuse(
    tensor: StoredTensor, message: str, *, expected: object = None, got: object = None, hint: str | None = None
) -> NoReturn:
    """Refuse a checkpoint because of one tensor.

    Raises:
        CheckpointError: always.
    """
    raise CheckpointError(message, where=tensor.file, expected=expected, got=got, hint=hint)
