"""Models that transformers builds from a config.json, without weights, and their layers as data that can be compared.

Two layers that compute the same function of the residual stream have equal descriptions: the classes of their modules,
the names and shapes of their tensors, every plain value that a module keeps (a window, a scale, a flag), and their
entries in the config's lists with one entry a layer. A layer's own number is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.errors import printable
from .stacks import is_layer_list, is_of_vision_or_audio

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

#: attributes that hold a layer's own number
_OWN_NUMBER = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "layer_num", "block_idx", "idx"})
#: flags of configs that make a layer's function depend on its own number
_NUMBER_MATTERS = ("scale_attn_by_inverse_layer_idx",)
#: attributes that hold the number of another layer
_OTHER_NUMBER = re.compile(r"layer_(idx|id|index)$")
#: lists in configs that are as long as the depth only by chance, or hold numbers of layers
_OTHER_LIST = re.compile(
    r"token|architectures|id2label|label2id|sections?$|_ind(ex|ic)es$|_idxs$|^(moe|mlp_only)_layers$"
)
_PLAIN = (bool, int, float, str, type(None))
_LONGEST = 64  # entries of a list that is compared


class CannotBuild(Exception):
    """transformers cannot build the model; the message is the reason."""


@dataclass(frozen=True)
class LayerRef:
    """The number of another layer that a layer uses, such as the one whose keys and values it shares."""

    layer: int


@dataclass(frozen=True)
class Difference:
    """What differs between two layers.

    Attributes:
        what: ``self_attn.sliding_window``, for example.
        ours: The value in the first layer; None where it has none.
        theirs: The value in the second one.
    """

    what: str
    ours: object
    theirs: object

    def __str__(self) -> str:
        return f"{self.what}: {_shown(self.ours)}, not {_shown(self.theirs)}"


@dataclass(frozen=True)
class LayerDescription:
    """A layer of a built model as data.

    Attributes:
        parts: Classes of modules (``self_attn: class``), shapes (``self_attn.q_proj.weight``), plain values of modules
            (``self_attn.scaling``), and entries of the config's lists (``config.layer_types``).
    """

    parts: Mapping[str, object]

    def differences(self, other: LayerDescription, origins: Mapping[int, int] | None = None) -> list[Difference]:
        """What differs from another layer; the most telling first: config, classes, plain values, shapes.

        Args:
            other: The layer that this one should be like, of the same or another model.
            origins: The layer of the other model for each layer of this one, for numbers of other layers.
        """
        found = []
        for what in dict.fromkeys([*other.parts, *self.parts]):
            ours, theirs = self.parts.get(what), other.parts.get(what)
            if what.startswith("config.") and (what not in self.parts or what not in other.parts):
                continue  # a list is as long as one depth by chance
            if origins is not None and isinstance(ours, LayerRef):
                ours = LayerRef(origins.get(ours.layer, ours.layer))
            if ours != theirs:
                found.append(Difference(what, ours, theirs))
        return sorted(found, key=lambda d: (not d.what.startswith("config."), not d.what.endswith("class"), _rank(d)))

    def same_function(self) -> tuple:
        """A hashable value that is equal for equal descriptions."""
        return tuple(sorted((what, repr(value)) for what, value in self.parts.items()))


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
        return CONFIG_MAPPING[model_type].from_dict(dict(config))
    except Exception as error:  # validation raises errors of many types
        raise CannotBuild(f"transformers cannot read the config.json: {reason(error)}") from None


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


def describe_stack(model: PreTrainedModel, path: str) -> tuple[LayerDescription, ...]:
    """Every layer of a stack as data.

    Args:
        model: A built model.
        path: The stack's path, from `stacks`.
    """
    layers = stacks(model)[path]
    config = _stack_config(model, path)
    parts = [dict(_parts(layer)) for layer in layers]
    numbered = _number_matters(config)
    for what in dict.fromkeys(what for part in parts for what in part):
        values = [(i, part[what]) for i, part in enumerate(parts) if what in part]
        own = what.rpartition(".")[2] in _OWN_NUMBER or (len(values) > 2 and "class" not in what)
        if own and not numbered and all(type(v) is int and v == i for i, v in values):
            for part in parts:
                part.pop(what, None)
        elif _OTHER_NUMBER.search(what):
            for part in parts:
                number = part.get(what)
                if type(number) is int and not (numbered and what.rpartition(".")[2] in _OWN_NUMBER):
                    part[what] = LayerRef(number)
    for key, values in config_lists(config, len(layers)).items():
        for part, value in zip(parts, values, strict=True):
            part[f"config.{key}"] = value
    return tuple(map(LayerDescription, parts))


def config_lists(config: PreTrainedConfig, depth: int) -> dict[str, list]:
    """The lists with one entry a layer in a config as transformers resolves it."""
    found = {}
    for key, value in vars(config).items():
        key = key.removeprefix("_")
        if not isinstance(value, (list, tuple)) or len(value) != depth or _OTHER_LIST.search(key):
            continue
        entries = [_value(entry) for entry in value]
        if any(entry is _OPAQUE for entry in entries) or _are_numbers(entries):
            continue
        found[key] = entries
    return found


def reason(error: BaseException) -> str:
    """An error of a library in one line."""
    text = " ".join(str(error).split())
    return printable(f"{type(error).__name__}: {text}"[:300])


class _Opaque:
    pass


_OPAQUE = _Opaque()


def _are_numbers(entries: Sequence[object]) -> bool:
    """Whether a list seems to hold numbers of layers: it rises, and is longer than flags can make it."""
    if len(entries) < 3 or any(type(e) is not int for e in entries):
        return False
    return all(a < b for a, b in zip(entries, entries[1:], strict=False))  # type: ignore[operator]


def _stack_config(model: PreTrainedModel, path: str) -> PreTrainedConfig:
    """The config of the innermost model around a stack."""
    from transformers import PreTrainedModel

    config = model.config
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and (not name or path.startswith(f"{name}.")):
            config = module.config
    return config


def _number_matters(config: PreTrainedConfig) -> bool:
    return any(getattr(config, flag, False) for flag in _NUMBER_MATTERS)


def _parts(layer: torch.nn.Module) -> Iterator[tuple[str, object]]:
    """Classes, shapes and plain values of a layer, by their paths."""
    import torch

    internal = vars(torch.nn.Module()).keys() | {"_is_hf_initialized", "gradient_checkpointing", "config", "name"}
    for path, module in layer.named_modules(remove_duplicate=False):
        within = f"{path}." if path else ""
        yield f"{within}class", f"{type(module).__module__}.{type(module).__qualname__}"
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            yield f"{within}{name}", None if tensor is None else tuple(tensor.shape)
        for name, value in vars(module).items():
            if name not in internal and (plain := _value(value)) is not _OPAQUE:
                yield f"{within}{name}", plain


def _value(value: object) -> object:
    """A plain value, lists and mappings of them as tuples; `_OPAQUE` for anything else."""
    import enum

    import torch

    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (torch.dtype, torch.Size)):
        return str(value)
    if isinstance(value, (list, tuple, set, frozenset)) and len(value) <= _LONGEST:
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        inner = tuple(map(_value, items))
        return _OPAQUE if any(i is _OPAQUE for i in inner) else inner
    if isinstance(value, Mapping) and len(value) <= _LONGEST and all(isinstance(k, str) for k in value):
        inner = tuple((k, _value(v)) for k, v in sorted(value.items()))
        return _OPAQUE if any(v is _OPAQUE for _, v in inner) else inner
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return _OPAQUE


def _rank(difference: Difference) -> tuple:
    """Plain values before shapes, outer modules before inner ones."""
    shapes = any(isinstance(v, tuple) for v in (difference.ours, difference.theirs))
    return shapes, difference.what.count(".")


def _shown(value: object) -> str:
    if isinstance(value, LayerRef):
        return f"layer {value.layer}"
    text = repr(value) if not isinstance(value, tuple) else repr(list(value))
    if isinstance(value, str) and value.startswith("transformers."):
        text = value.rpartition(".")[2]
    return "nothing" if value is None else text[:80]
