"""Stacks of layers, found by tensor names, and the keys of config.json that hold their depths. Needs no family."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .config_json import Config, value_at

INDEX = "0|[1-9][0-9]{0,8}"  # of a layer; with leading zeros, two names could mean one layer
#: a tensor of a layer: ``prefix``, ``index``, ``suffix``
LAYER = re.compile(
    rf"(?P<prefix>(?:.*?\.)?(?:layers|layer|h|blocks|block))\.(?P<index>{INDEX})\.(?P<suffix>.+)", re.DOTALL
)
#: keys of config.json that hold a depth
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
#: lists with one entry a layer, for configs that say a depth in no other way
DEPTH_LISTS = ("layers_block_type",)
#: words in a stack's prefix, section of the config, and the keys that hold a depth there
_SECTIONS = (
    (("vision", "visual", "image"), "vision_config", (*DEPTH_KEYS, "depth")),
    (("audio", "speech"), "audio_config", (*DEPTH_KEYS, "encoder_layers")),
)
_SIDES = {"encoder": ("encoder_layers", "num_encoder_layers"), "decoder": ("decoder_layers", "num_decoder_layers")}
#: families whose decoder is as deep as the encoder (``num_layers``) where ``num_decoder_layers`` is missing or null
_SYMMETRIC = {"t5", "mt5", "umt5", "longt5", "pop2piano", "udop"}


def find_stacks(names: Sequence[str]) -> dict[str, dict[int, dict[str, str]]]:
    """All tensors whose names are like a layer's: prefix -> layer -> name under the prefix -> name."""
    stacks: dict[str, dict[int, dict[str, str]]] = {}
    for name in names:
        if match := LAYER.fullmatch(name):
            layer = stacks.setdefault(match["prefix"], {}).setdefault(int(match["index"]), {})
            layer[match["suffix"]] = name
    return stacks


def depth_at(config: Config, path: Sequence[str]) -> Any:
    """The depth that these keys lead to, as the config says or implies it: an integer, or the length of a list."""
    value = value_at({**config, **implied_depths(config)}, path)
    return len(value) if isinstance(value, list) and path[-1] in DEPTH_LISTS else value


def implied_depths(config: Config) -> dict[str, Any]:
    """The depths that are missing in a config and are another stack's: they must be said before that one changes."""
    depth, said = config.get("num_layers"), config.get("num_decoder_layers") is not None
    return {} if said or depth is None or config.get("model_type") not in _SYMMETRIC else {"num_decoder_layers": depth}


def depth_path(config: Config, prefix: str, depth: int) -> tuple[str, ...] | None:
    """The keys that lead to a stack's depth in config.json; None where no key holds it."""
    words = set(re.split(r"[._]", prefix))
    for marks, section, keys in _SECTIONS:
        if words & set(marks):
            return _first(config, [(section, key) for key in keys], depth)
    sided = [(key,) for side, keys in _SIDES.items() if side in words for key in keys]
    keys = (*DEPTH_KEYS, *DEPTH_LISTS)
    plain = [(key,) for key in keys] + [("text_config", key) for key in keys]
    return _first(config, sided + plain, depth)


def module_name(prefix: str, path: Sequence[str]) -> str:
    """The name of one stack of several in recipes, by its prefix and the keys of its depth. Names are mergekit's."""
    sections = {"vision_config": "vision_tower", "audio_config": "audio_tower", "text_config": "text_decoder"}
    return sections.get(path[0]) or side_of(prefix) or "text_decoder"


def side_of(prefix: str) -> str | None:
    """``encoder`` or ``decoder``, by the words of a stack's prefix or path; None where it has neither."""
    return next((word for word in re.split(r"[._]", prefix) if word in _SIDES), None)


def is_layer_list(path: str) -> bool:
    """Whether a list of modules at this path is named like a stack of layers."""
    return path.rpartition(".")[2] in ("layers", "layer", "h", "blocks", "block")


def is_of_vision_or_audio(prefix: str) -> bool:
    """Whether a prefix or a module's path is one of a vision or audio tower."""
    words = set(re.split(r"[._]", prefix))
    return any(words & set(marks) for marks, _, _ in _SECTIONS)


def is_vision_or_audio(path: Sequence[str]) -> bool:
    """Whether the stack whose depth these keys lead to is the vision or audio tower of a language model."""
    return path[0] in {section for _, section, _ in _SECTIONS}


def is_of_stack(name: str, path: Sequence[str]) -> bool:
    """Whether a module's name may be one of the stack whose depth these keys lead to, and of no other stack."""
    words = set(re.split(r"\W|_", name))
    tower = next((section for marks, section, _ in _SECTIONS if words & set(marks)), None)
    if tower is not None or is_vision_or_audio(path):
        return tower == path[0]
    side = next((side for side, keys in _SIDES.items() if path[-1] in keys), None)
    other = next((side for side in _SIDES if side in words), None)
    return side is None or other is None or side == other


def same_depths(config: Config, path: Sequence[str]) -> list[tuple[str, ...]]:
    """All keys that hold the depth of one stack, beginning with a path from `depth_path`.

    The language model's may stand at the top and in ``text_config``, and under several names.
    """
    depth, places = depth_at(config, path), [tuple(path)]
    sided = {key for keys in _SIDES.values() for key in keys}
    if path[-1] == "num_decoder_layers" or (
        path[-1] in _SIDES["decoder"] and any(key in config for key in _SIDES["encoder"])
    ):
        return places  # the plain keys are the encoder's
    sections: list[tuple[str, ...]] = [tuple(path[:-1])]
    if path[-1] not in sided and not is_vision_or_audio(path):
        sections += [(), ("text_config",)]
    keys = (*DEPTH_KEYS, "num_blocks")
    places += [(*section, key) for section in sections for key in keys if value_at(config, (*section, key)) == depth]
    return list(dict.fromkeys(places))


def _first(config: Config, paths: Sequence[tuple[str, ...]], depth: int) -> tuple[str, ...] | None:
    return next((path for path in paths if depth_at(config, path) == depth), None)
