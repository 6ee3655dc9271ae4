"""Whether the layers that a config.json builds are the ones that are meant: each like the layer that it comes from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .built import build, main_stack, resolved_config
from .config_json import Config
from .layer_description import Difference, LayerDescription, describe_stack
from .stacks import DEPTH_KEYS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: keys of configs that say which layers are of which kind
_PLACING = re.compile(
    r"layer|pattern|interval|period|offset|_step$|_freq$|first_k|dense_replace|ind(ex|ic)es$|_idxs$|block_type|interleave"
)
_NOT_PLACING = re.compile(r"norm|layerdrop|layer_scale|^num_layers$|vision|audio|rope_interleave|^_")
#: words in what differs between layers, and in the keys that may decide about it
_AFFINITIES = (
    (
        re.compile(r"mlp|moe|expert|feed_forward|ffn|block_sparse"),
        re.compile(r"moe|dense|sparse|mlp|expert|interleave"),
    ),
    (
        re.compile(r"attn|attention|mixer|mamba|conv|window|rope|rotary|temporal"),
        re.compile(r"attn|attention|window|rope|layer_types|pattern|full|linear|mamba|hybrid|block_type|shared|period"),
    ),
)
_SHOWN_KEYS = 4


@dataclass(frozen=True)
class BuiltStack:
    """The layers that transformers builds from a config.json.

    Attributes:
        layers: Each as data.
        config: The config.json.
        model: The name of the built class.
    """

    layers: tuple[LayerDescription, ...]
    config: Config
    model: str

    @classmethod
    def of(cls, model: PreTrainedModel, layer_prefix: str, config: Config) -> BuiltStack:
        """The stack of a built model whose tensors have this prefix in checkpoints.

        Raises:
            CannotBuild: it has no stack.
        """
        return cls(describe_stack(model, main_stack(model, layer_prefix)), config, type(model).__name__)


@dataclass(frozen=True)
class LayerOrigin:
    """A layer that an output layer comes from.

    Attributes:
        stack: The layers of its model.
        layer: Its number there.
        name: The name of its model.
    """

    stack: BuiltStack
    layer: int
    name: str


@dataclass(frozen=True)
class Misfit:
    """An output layer that is built unlike the layers that it comes from.

    Attributes:
        layer: The output layer.
        origin: The layer that it is most like, of those it comes from.
        differences: What differs; the most telling first.
        keys: The keys of config.json that probably decide about it; the likeliest first.
    """

    layer: int
    origin: LayerOrigin
    differences: tuple[Difference, ...]
    keys: tuple[str, ...]

    def __str__(self) -> str:
        keys = f" (config.json: {', '.join(self.keys)})" if self.keys else ""
        return (
            f"layer {self.layer} would not be like layer {self.origin.layer} of {self.origin.name}:"
            f" {self.differences[0]}{keys}"
        )


def build_stack(config: Config, layer_prefix: str) -> BuiltStack:
    """Build a model without weights and describe its layers.

    Args:
        config: config.json.
        layer_prefix: The prefix of the names of the stack's tensors in checkpoints.

    Raises:
        CannotBuild: transformers cannot.
    """
    return BuiltStack.of(build(resolved_config(config)), layer_prefix, config)


def misfits(output: BuiltStack, origins: Sequence[Sequence[LayerOrigin]]) -> list[Misfit]:
    """The output layers that are built unlike each of the layers that they come from.

    Args:
        output: The built output; it must have as many layers as there are origins.
        origins: For each output layer, the layers that it comes from: it must be like one of them.
    """
    found = []
    for i, (layer, sources) in enumerate(zip(output.layers, origins, strict=True)):
        best: Misfit | None = None
        for origin in sources:
            mapped = _mapping(origins, origin)
            differences = layer.differences(origin.stack.layers[origin.layer], mapped)
            if best is None or len(differences) < len(best.differences):
                best = Misfit(i, origin, tuple(differences), likely_keys(output.config, differences))
        if best is not None and best.differences:
            found.append(best)
    return found


def likely_keys(config: Config, differences: Iterable[Difference]) -> tuple[str, ...]:
    """The keys of a config.json that probably decide about what differs between two layers."""
    what = [difference.what for difference in differences]
    named = [w.removeprefix("config.") for w in what if w.startswith("config.")]
    sections = [config, *(v for k, v in config.items() if isinstance(v, Mapping) and k.endswith("text_config"))]
    keys = dict.fromkeys(
        key
        for part in sections
        for key, value in part.items()
        if _PLACING.search(key) and not _NOT_PLACING.search(key) and key not in DEPTH_KEYS and value is not None
    )
    liked = [
        key
        for words, wanted in _AFFINITIES
        if any(words.search(w.rpartition(".")[0] or w) for w in what)
        for key in keys
        if wanted.search(key)
    ]
    there = [key for key in named if any(key in part for part in sections)]
    implied = [key for key in named if key not in there]  # worked out from others
    return tuple(dict.fromkeys([*there, *(liked or keys), *implied]))[:_SHOWN_KEYS]


def _mapping(origins: Sequence[Sequence[LayerOrigin]], origin: LayerOrigin) -> dict[int, int]:
    """For output layers that come from one model: their layers there."""
    return {i: o.layer for i, sources in enumerate(origins) for o in sources if o.stack is origin.stack}
