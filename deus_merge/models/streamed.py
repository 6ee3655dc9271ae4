"""Models of transformers whose weights are in memory only while they are used.

transformers builds the model without weights and runs its own code, with its own masks and rotary embeddings. Each
decoder layer, and each module outside of the layers, loads its weights from the file and drops them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from ..checkpoint.tensor_source import TensorSource
from .view import ModelView, prefix_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class CannotStream(Exception):
    """The weights of a model cannot be loaded part by part; the message is the reason."""


class StreamedModel:
    """A model without weights, and its parts, which load them.

    Args:
        model: As `built.build` makes it, on the meta device. It is changed.
        view: The checkpoint by layer and role.
        source: The checkpoint. Weights are read from it when a part is loaded, so it may be replaced by another one of
            the same names and shapes.
        device: Where weights and buffers are put.
        dtype: Of the loaded weights; None for float32.

    Attributes:
        layers: The decoder layers, in their order.
        others: The modules outside of the layers that have weights of their own.

    Raises:
        CannotStream: the family is not described, or transformers gives its tensors other names.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        view: ModelView,
        source: TensorSource,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ):
        import torch

        self.model, self.source, self.device, self.dtype = model, source, device, dtype or torch.float32
        stored = _stored_names(model, source)
        if view.family is None:
            raise CannotStream(f"family {view.model_type!r} is not described")
        if model.state_dict().keys() != stored.keys():
            raise CannotStream("transformers gives its tensors other names")
        if not _initialise_buffers(model, device):
            raise CannotStream("transformers does not initialise its buffers")
        prefixes = [prefix_of(i, view.layer_prefix).rstrip(".") for i in range(view.num_layers)]
        modules = dict(model.named_modules())
        if missing := [prefix for prefix in prefixes if prefix not in modules]:
            raise CannotStream(f"transformers has no module {missing[0]}")
        self.layers = tuple(
            Part(self, modules[prefix], dict(modules[prefix].named_modules(prefix=prefix)), stored)
            for prefix in prefixes
        )
        inside = tuple(f"{prefix}." for prefix in prefixes)
        outside = [name for name in modules if name not in prefixes and not name.startswith(inside)]
        parts = (Part(self, modules[name], {name: modules[name]}, stored) for name in outside)
        self.others = tuple(part for part in parts if part.weights)

    def load_when_called(self, parts: Sequence[Part]) -> None:
        """Let parts load their weights before they run and drop them afterwards."""
        for part in parts:
            part.module.register_forward_pre_hook(part.load)
            part.module.register_forward_hook(part.drop)


class Part:
    """A module whose weights are loaded and dropped together.

    Attributes:
        module: The module.
        weights: The owner of each parameter, its name there, and the name of its stored tensor.
    """

    def __init__(
        self, whole: StreamedModel, module: torch.nn.Module, owners: dict[str, torch.nn.Module], stored: dict[str, str]
    ):
        self.module = module
        self.weights = [
            (owner, key, stored[f"{name}.{key}" if name else key])
            for name, owner in owners.items()
            for key, parameter in owner._parameters.items()
            if parameter is not None
        ]
        self._whole = whole
        self._empty = [owner._parameters[key] for owner, key, _ in self.weights]
        self._held = 0

    def load(self, *_) -> None:
        """Load the weights, unless they are held."""
        import torch

        if self._held:
            return
        for owner, key, tensor in self.weights:
            # A copy with its own memory, aligned as in the whole model.
            value = self._whole.source.read(tensor).to(self._whole.device, self._whole.dtype, copy=True)
            owner._parameters[key] = torch.nn.Parameter(value, requires_grad=False)

    def drop(self, *_) -> None:
        """Drop the weights, unless they are held."""
        if self._held:
            return
        for (owner, key, _), parameter in zip(self.weights, self._empty, strict=True):
            owner._parameters[key] = parameter

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the weights in memory for several calls."""
        self.load()
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            self.drop()

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Do not load the weights when the module is called, since something else is run in its place."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1


@contextmanager
def all_held(parts: Sequence[Part]) -> Iterator[None]:
    """`Part.held` for several parts."""
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(part.held())
        yield


def _stored_names(model: PreTrainedModel, source: TensorSource) -> dict[str, str]:
    """The checkpoint's tensor for each parameter: its own, or that of a parameter that it is tied to."""
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    stored = {}
    for names in tied.values():
        present = [name for name in names if name in source.tensors]
        stored |= {name: name if name in present else present[0] for name in names if present}
    return stored


def _initialise_buffers(model: PreTrainedModel, device: torch.device | str) -> bool:
    """Initialise the buffers that a checkpoint does not hold (rotary frequencies), as transformers does at loading.

    Returns:
        Whether all were initialised.
    """
    import torch

    buffers = []
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers[name]) is not None:
                if not buffer.is_floating_point():
                    return False
                module._buffers[name] = torch.full_like(buffer, torch.nan, device="cpu")
                buffers.append((module, name))
    model.initialize_weights()  # has no effect on parameters, which have no memory
    for module, name in buffers:
        if bool(module._buffers[name].isnan().any()):
            return False
        module._buffers[name] = module._buffers[name].to(device)
    return True
