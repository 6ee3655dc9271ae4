"""The layers of a built model as data that can be compared.

Two layers that compute the same function of the residual stream have equal descriptions: the classes of their modules,
the names and shapes of their tensors, every plain value that a module keeps (a window, a scale, a flag), and their
entries in the config's lists with one entry a layer. A layer's own number is left out, unless its function depends on
it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from .built import stacks

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

#: attributes that hold a layer's own number
_OWN_NUMBER = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "layer_num", "block_idx", "idx"})
#: attributes beside a layer's own number that show that its function depends on it
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer")
#: attributes that hold the number of another layer
_OTHER_NUMBER = re.compile(r"layer_(idx|id|index)$")
#: lists in configs that are as long as the depth only by chance, or hold numbers of layers
_OTHER_LIST = re.compile(
    r"token|architectures|id2label|label2id|sections?$|_ind(ex|ic)es$|_idxs$|^(moe|mlp_only)_layers$"
)
_PLAIN = (bool, int, float, str, type(None))
_LONGEST = 64  # entries of a list that is compared


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
        return f"{self.what}: {shown(self.ours)}, not {shown(self.theirs)}"


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


def describe_stack(model: PreTrainedModel, path: str) -> tuple[LayerDescription, ...]:
    """Every layer of a stack as data.

    Args:
        model: A built model.
        path: The stack's path, from `stacks`.
    """
    layers = stacks(model)[path]
    config = _stack_config(model, path)
    parts = [dict(_parts(layer)) for layer in layers]
    for what in dict.fromkeys(what for part in parts for what in part):
        within, _, name = what.rpartition(".")
        found = [(i, part[what]) for i, part in enumerate(parts) if what in part]
        if name in _OWN_NUMBER and _counts(found):
            matters = any(f"{within}.{depth}" in part for part in parts for depth in _DEPTHS)
            for part in parts if not matters else ():
                part.pop(what, None)
        elif _OTHER_NUMBER.search(name):
            for part in parts:
                if type(number := part.get(what)) is int:
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


class _Opaque:
    pass


_OPAQUE = _Opaque()


def _counts(values: Sequence[tuple[int, object]]) -> bool:
    """Whether values are the numbers of their layers, or count parts of layers, two of them in each."""
    first, start = values[0]
    found = [value for _, value in values]
    if type(start) is not int or any(type(value) is not int for value in found):
        return False
    return any(found == [start + step * (i - first) for i, _ in values] for step in (1, 2))


def _are_numbers(entries: Sequence[object]) -> bool:
    """Whether a list seems to hold numbers of layers: it rises, and is longer than flags can make it."""
    numbers = [entry for entry in entries if type(entry) is int]
    return len(numbers) == len(entries) >= 3 and all(a < b for a, b in pairwise(numbers))


def _stack_config(model: PreTrainedModel, path: str) -> PreTrainedConfig:
    """The config of the innermost model around a stack."""
    from transformers import PreTrainedModel

    config = model.config
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and (not name or path.startswith(f"{name}.")):
            config = module.config
    return config


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


def shown(value: object) -> str:
    """A part of a description for messages."""
    if isinstance(value, LayerRef):
        return f"layer {value.layer}"
    text = repr(value) if not isinstance(value, tuple) else repr(list(value))
    if isinstance(value, str) and value.startswith("transformers."):
        text = value.rpartition(".")[2]
    return "nothing" if value is None else text[:80]
