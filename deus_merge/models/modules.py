"""The modules of a model: each stack of layers with its embeddings and norms, and the parts that connect stacks.

A model with one stack has one module, ``default``. Vision-language models have ``text_decoder``, ``vision_tower`` and
``multi_modal_projector``, encoder-decoders ``encoder`` and ``decoder``. Any other module is named by the first part of
its tensors' names.

Reference: the names of mergekit's ``modules:``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .config_json import Config
from .stacks import depth_path, find_stacks, module_name
from .view import ModelView, stack_view

DEFAULT = "default"
_PROJECTOR = re.compile(r"(?:.*\.)?(?:multi_modal_projector|mm_projector|embed_vision|connector|merger)\..*")
_HEAD = re.compile(r"(?:.*\.)?(?:lm_head|embed_out)\..*")


def view_modules(config: Config, names: Sequence[str], whole: ModelView) -> dict[str, ModelView]:
    """A checkpoint's modules, by their names in recipes.

    Args:
        config: config.json.
        names: All tensor names.
        whole: The view of the whole checkpoint from `view_model`.

    Returns:
        Views that share no tensor. A tensor that several modules could claim is in none of them.
    """
    stacks = {prefix: layers for prefix, layers in find_stacks(names).items() if set(layers) == set(range(len(layers)))}
    found = {prefix: depth_path(config, prefix, len(layers)) for prefix, layers in stacks.items()}
    paths = {prefix: path for prefix, path in found.items() if path}
    stacks = {prefix: stacks[prefix] for prefix in paths}
    if len(stacks) < 2:
        return {DEFAULT: whole}
    module_names: dict[str, str] = {}
    for prefix, path in paths.items():
        name = module_name(prefix, path)
        module_names[prefix] = prefix if name in module_names.values() else name
    in_layers = {name for layers in stacks.values() for layer in layers.values() for name in layer.values()}
    outside: dict[str, list[str]] = {}
    for name in names:
        if name not in in_layers and (owner := _owner(name, module_names)) is not None:
            outside.setdefault(owner, []).append(name)
    views = {
        module_names[prefix]: stack_view(
            whole.model_type, config, prefix, layers, paths[prefix], outside.pop(module_names[prefix], [])
        )
        for prefix, layers in stacks.items()
    }
    return views | {
        name: ModelView(None, whole.model_type, (), "", tuple(own), (), ()) for name, own in outside.items()
    }


def _owner(name: str, module_names: Mapping[str, str]) -> str | None:
    """The module of a tensor outside the layers; None for a tensor that several modules could claim."""
    if _PROJECTOR.fullmatch(name):
        return "multi_modal_projector"
    shared = {prefix: _common(name, prefix) for prefix in module_names}
    most = max(shared.values())
    best = [prefix for prefix, count in shared.items() if count == most]
    if most and len(best) == 1:
        return module_names[best[0]]
    if _HEAD.fullmatch(name) and "text_decoder" in module_names.values():
        return "text_decoder"
    return None if most else name.partition(".")[0]


def _common(name: str, prefix: str) -> int:
    """Number of leading parts that a name shares with a stack's prefix, without the prefix's last part."""
    count = 0
    for one, other in zip(name.split("."), prefix.split(".")[:-1], strict=False):
        if one != other:
            break
        count += 1
    return count
