"""The modules of a model: each stack of layers with the tensors around it, and what stands between stacks.

A model with one stack has one module, ``default``. Vision-language models have ``text_decoder``, ``vision_tower`` and
``multi_modal_projector``, encoder-decoders ``encoder`` and ``decoder``; anything else goes by its first name.

Reference: the names of mergekit's ``modules:``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .stacks import depth_path, find_stacks, module_name
from .view import ModelView, stack_view

DEFAULT = "default"
_PROJECTOR = re.compile(r"(?:.*\.)?(?:multi_modal_projector|mm_projector|embed_vision|connector|merger)\..*")
_HEAD = re.compile(r"(?:.*\.)?(?:lm_head|embed_out)\..*")


def view_modules(config: Mapping, names: Sequence[str], whole: ModelView) -> dict[str, ModelView]:
    """A checkpoint's modules, by the names that recipes use.

    Args:
        config: config.json.
        names: All tensor names.
        whole: The checkpoint with its main stack, as `view_model` has it.

    Returns:
        Views that share no tensor. All of them together may lack some, which belong to no module.
    """
    stacks = {prefix: layers for prefix, layers in find_stacks(names).items() if set(layers) == set(range(len(layers)))}
    paths = {prefix: depth_path(config, prefix, len(layers)) for prefix, layers in stacks.items()}
    stacks = {prefix: layers for prefix, layers in stacks.items() if paths[prefix]}
    if len(stacks) < 2:
        return {DEFAULT: whole}
    called: dict[str, str] = {}
    for prefix in stacks:
        name = module_name(prefix, paths[prefix])
        called[prefix] = prefix if name in called.values() else name
    in_layers = {name for layers in stacks.values() for layer in layers.values() for name in layer.values()}
    around: dict[str | None, list[str]] = {}
    for name in names:
        if name not in in_layers:
            around.setdefault(_owner(name, called), []).append(name)
    views = {
        called[prefix]: stack_view(
            whole.model_type, config, prefix, layers, paths[prefix], around.pop(called[prefix], [])
        )
        for prefix, layers in stacks.items()
    }
    around.pop(None, None)
    return views | {name: ModelView(None, whole.model_type, (), "", tuple(own), (), ()) for name, own in around.items()}


def _owner(name: str, called: Mapping[str, str]) -> str | None:
    """The module that a tensor outside of layers belongs to; None for one that several could claim."""
    if _PROJECTOR.fullmatch(name):
        return "multi_modal_projector"
    shared = {prefix: _common(name, prefix) for prefix in called}
    most = max(shared.values())
    best = [prefix for prefix, count in shared.items() if count == most]
    if most and len(best) == 1:
        return called[best[0]]
    if _HEAD.fullmatch(name) and "text_decoder" in called.values():
        return "text_decoder"
    return None if most else name.partition(".")[0]


def _common(name: str, prefix: str) -> int:
    """How many first parts two names share, a stack's last part aside."""
    count = 0
    for one, other in zip(name.split("."), prefix.split(".")[:-1], strict=False):
        if one != other:
            break
        count += 1
    return count
