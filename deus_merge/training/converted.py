"""Parameters that transformers makes from stored tensors of other names: one for all experts of a layer, say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module


def made_from(model: Module, stored: Iterable[str]) -> Mapping[str, list[str]]:
    """The stored tensors that each renamed or converted parameter, or buffer, is made from.

    Args:
        model: The model, wrapped or not.
        stored: The names of all stored tensors.

    Returns:
        Parameter -> stored tensors, for parameters of the unwrapped model that are not stored under their own names;
        empty for a version of transformers that converts nothing.
    """
    inner = next((m for m in model.modules() if hasattr(m, "base_model_prefix") and hasattr(m, "config")), None)
    if inner is None:
        return {}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return {}
    model_of: Any = inner  # a PreTrainedModel
    mapping = get_model_conversion_mapping(model_of, None, None)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    own = dict(inner.named_parameters(remove_duplicate=False)) | dict(inner.named_buffers())
    found: dict[str, list[str]] = {}
    for name in stored:
        if name in own:
            continue
        first, pattern = rename_source_key(name, renamings, converters, model_of.base_model_prefix, own)
        converter = next((c for c in converters if pattern in c.source_patterns), None)
        targets = converter.target_patterns if converter is not None else [""]
        for target in targets:
            made = first.replace(targets[0], target, 1) if target else first
            if made in own:
                found.setdefault(made, []).append(name)
    return found
