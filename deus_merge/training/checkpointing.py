"""Gradient checkpointing that computes nothing again below the lowest new layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core.errors import TrainingError
from .quantized import pretrained

if TYPE_CHECKING:
    from torch.nn import Module


def enable_checkpointing(model: Any) -> None:
    """Enable gradient checkpointing of a model of transformers, without re-entry, and `spare_frozen`.

    Args:
        model: The model, not wrapped.

    Raises:
        TrainingError: it has none.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise TrainingError(
            "this model has no gradient checkpointing", where=type(model).__name__, hint="checkpointing=False"
        )
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    spare_frozen(model)


def spare_frozen(model: Module) -> None:
    """Let the outputs of frozen embeddings not require gradients, which transformers arranges when it enables gradient
    checkpointing: the backward pass would compute every layer again, also those below the lowest that trains.

    With re-entry this is left as it is: a checkpoint whose inputs require no gradient has none then.

    Args:
        model: The model, wrapped or not.
    """
    uses = [
        getattr(module, "_gradient_checkpointing_func", None)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    ]
    if uses and all(getattr(use, "keywords", {}).get("use_reentrant") is False for use in uses):
        for inner in pretrained(model):
            inner.disable_input_require_grads()
