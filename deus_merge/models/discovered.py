"""Layers of a family that nobody described, described as far as copies need it: which tensors must be zeros."""

from __future__ import annotations

from dataclasses import replace

from .config_json import Config
from .spec import RESIDUAL, TensorSpec
from .stacks import is_vision_or_audio
from .view import ModelView


def describe(config: Config, view: ModelView) -> ModelView | str:
    """Find the tensors that write to the residual stream on a small model of the class (`discovery.find_writers`).

    Args:
        config: config.json.
        view: The model, or its language model, of an undescribed family.

    Returns:
        The view with a description of every tensor of its layers, all of them opaque; or the reason why not.
    """
    from .discovery import find_writers

    if is_vision_or_audio(view.layers_path):
        return "the layers of a vision or audio tower are not known"
    found = find_writers(config)
    if found.reason:
        return found.reason
    specs = []
    for layer, names in enumerate(view.layers):
        kind = found.kind_of(layer)
        if kind is None or kind.reason:
            return f"layer {layer}: {kind.reason if kind and kind.reason else 'it was not found out what writes'}"
        zero = {suffix: found.must_be_zero(layer, suffix) for suffix in names}
        if unknown := [suffix for suffix, must in zero.items() if must is None]:
            return f"layer {layer}: a small model of the class has no {unknown[0]}"
        if not any(zero.values()):
            return f"layer {layer}: no tensor was found that writes to the residual stream"
        specs.append({suffix: _opaque(suffix, bool(must)) for suffix, must in zero.items()})
    return replace(view, specs=tuple(specs))


def _opaque(suffix: str, writes: bool) -> TensorSpec:
    return TensorSpec(suffix, suffix, "unknown" if writes else None, RESIDUAL if writes else None, opaque=True)
