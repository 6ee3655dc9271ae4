"""Models that transformers builds from a config.json, without weights: modules, names and shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..core.errors import printable
from .stacks import DEPTH_KEYS, DEPTH_LISTS, is_layer_list, is_of_vision_or_audio

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


class CannotBuild(Exception):
    """transformers cannot build the model; the message is the reason."""


def resolved_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """A config.json as transformers reads it.

    Args:
        config: config.json.

    Raises:
        CannotBuild: its model_type is unknown to transformers, or a value has no meaning there.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        remote = " (its code comes with the model, and is not run)" if "auto_map" in config else ""
        raise CannotBuild(f"transformers does not know model_type {model_type!r}{remote}")
    try:
        return CONFIG_MAPPING[model_type].from_dict(_decoded(dict(config)))
    except Exception as error:  # validation raises errors of many types
        raise CannotBuild(f"transformers cannot read the config.json: {reason(error)}") from None


def _decoded(value: Any) -> Any:
    """A part of a config.json with its infinities, which transformers writes as ``{"__float__": "Infinity"}``."""
    if isinstance(value, dict):
        return (
            float(value["__float__"]) if value.keys() == {"__float__"} else {k: _decoded(v) for k, v in value.items()}
        )
    return [_decoded(v) for v in value] if isinstance(value, list) else value


def state_depth(config: dict[str, Any]) -> None:
    """Write the depth that transformers' class implies into a ``text_config`` that leaves it out, as some published
    vision-language models do: an output of another depth has to state it.

    Args:
        config: config.json; it is changed.
    """
    text = config.get("text_config")
    keys = (*DEPTH_KEYS, *DEPTH_LISTS)
    if not isinstance(text, dict) or any(key in part for part in (config, text) for key in keys):
        return
    try:
        implied = resolved_config(config).to_dict().get("text_config") or {}
    except CannotBuild:
        return
    text |= {key: implied[key] for key in DEPTH_KEYS if isinstance(implied.get(key), int)}


def build(config: PreTrainedConfig, *, language_model: bool = False) -> PreTrainedModel:
    """The model on the meta device: modules, names and shapes, no weights. For float32.

    Args:
        config: As transformers reads it; it is not changed.
        language_model: To run it: prefer the class with a language model's head to the class that the config names, and
            take the attention that transformers would take.

    Raises:
        CannotBuild: transformers has no class for it, or the class cannot be built from it.
    """
    import copy

    import torch

    config = copy.deepcopy(config)
    # packed tensors have other names and shapes in every model alike: they are compared with the base's
    vars(config).pop("quantization_config", None)
    kind = model_class(config, language_model=language_model)
    try:
        with torch.device("meta"):
            attention = {} if language_model else {"attn_implementation": "eager"}  # every model has that
            return kind._from_config(config, dtype=torch.float32, **attention).eval()
    except Exception as error:  # a model's constructor may raise anything
        raise CannotBuild(f"transformers cannot build {kind.__name__}: {reason(error)}") from None


def model_class(config: PreTrainedConfig, *, language_model: bool = False) -> type[PreTrainedModel]:
    """The class of a config: the one that it names, else the language model, else the bare model.

    Raises:
        CannotBuild: there is none.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    names = config.architectures if isinstance(config.architectures, (list, tuple)) else ()
    named = [getattr(transformers, name, None) for name in names if isinstance(name, str)]
    fits = [c for c in named if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)]
    fits = [c for c in fits if getattr(c, "config_class", None) is type(config)]
    encodes = getattr(config, "is_encoder_decoder", False)
    with_head = [auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING]
    heads = _classes(config, reversed(with_head) if encodes else with_head)
    mapped = [*heads, *fits] if language_model else [*fits, *heads]
    for kind in (*mapped, *_classes(config, [auto.MODEL_MAPPING])):
        return kind
    raise CannotBuild(f"transformers has no model for {type(config).__name__}")


def _classes(config: PreTrainedConfig, mappings: Iterable[Any]) -> list[type[PreTrainedModel]]:
    """The classes that transformers' mappings have for a config."""
    found = [mapping.get(type(config), None) for mapping in mappings]
    return [kind for kinds in found if kinds for kind in (kinds if isinstance(kinds, (tuple, list)) else [kinds])]


def stacks(model: torch.nn.Module) -> dict[str, torch.nn.ModuleList]:
    """Every stack of layers of a built model: path -> layers. Lists within layers are left out."""
    import torch

    found: dict[str, torch.nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, torch.nn.ModuleList) and is_layer_list(path) and len(module) and not inside:
            found[path] = module
    return found


def main_stack(model: torch.nn.Module, layer_prefix: str = "") -> str:
    """The path of the stack whose tensors have this prefix in checkpoints; without one, of the text stack.

    Args:
        model: A built model.
        layer_prefix: Like ``model.layers.{layer}.``; modules may have other names than stored tensors.

    Raises:
        CannotBuild: the model has no stack of layers.
    """
    words = [w for w in layer_prefix.rpartition("{layer}")[0].split(".") if w]
    found = stacks(model)
    if not found:
        raise CannotBuild(f"{type(model).__name__} has no list of layers")

    def rank(path: str) -> tuple:
        ours = path.split(".")
        tail = 0
        while tail < min(len(ours), len(words)) and ours[-1 - tail] == words[-1 - tail]:
            tail += 1
        seen = is_of_vision_or_audio(path) == is_of_vision_or_audio(".".join(words))
        sides = {"encoder", "decoder"}
        side = not words or sides & set(ours) == sides & set(words)
        return seen, side, len(set(ours) & set(words)), tail, sum(1 for _ in found[path].parameters())

    return max(found, key=rank)


def reason(error: BaseException) -> str:
    """An error of a library in one line."""
    text = " ".join(str(error).split())
    return printable(f"{type(error).__name__}: {text}"[:300])
