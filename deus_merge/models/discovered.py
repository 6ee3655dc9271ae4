"""Layers of a family that nobody described, described as far as copies need it: which tensors must be zeros."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from .config_json import Config
from .spec import RESIDUAL, TensorSpec
from .stacks import is_vision_or_audio
from .view import ModelView

if TYPE_CHECKING:
    from .discovery import Discovery


def describe(config: Config, view: ModelView, copied: Collection[int]) -> ModelView | str:
    """Find the tensors that write to the residual stream on a small model of the class (`discovery.find_writers`).

    Args:
        config: config.json.
        view: A stack of layers of an undescribed family.
        copied: The layers that must be described.

    Returns:
        The view with a description of every tensor of these layers and of those like them, all opaque; other layers may
        have none. Or the reason why not.
    """
    from .discovery import find_writers

    if is_vision_or_audio(view.layers_path):
        return "the layers of a vision or audio tower are not known"
    found = find_writers(config, view.layer_prefix)
    if found.reason:
        return found.reason
    specs = [_described(found, layer, names) for layer, names in enumerate(view.layers)]
    if reasons := [f"layer {layer}: {specs[layer]}" for layer in sorted(copied) if isinstance(specs[layer], str)]:
        return reasons[0]
    return replace(view, specs=tuple({} if isinstance(spec, str) else spec for spec in specs))


def _described(found: Discovery, layer: int, names: Iterable[str]) -> dict[str, TensorSpec] | str:
    """The description of a layer's tensors, or the reason why there is none."""
    kind = found.kind_of(layer)
    if kind is None or kind.reason:
        return kind.reason if kind and kind.reason else "it was not found out what writes"
    zero = {suffix: found.must_be_zero(layer, suffix) for suffix in names}
    if unknown := [suffix for suffix, must in zero.items() if must is None]:
        return f"a small model of the class has no {unknown[0]}"
    if not any(zero.values()):
        return "no tensor was found that writes to the residual stream"
    return {suffix: _opaque(suffix, bool(must)) for suffix, must in zero.items()}


def _opaque(suffix: str, writes: bool) -> TensorSpec:
    return TensorSpec(suffix, suffix, "unknown" if writes else None, RESIDUAL if writes else None, opaque=True)
