"""What a model family looks like: which tensors a decoder layer has and which spaces they connect. Data, not code.

A family is one file in ``families/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ..core.plugins import plugins

RESIDUAL = "residual"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a decoder layer.

    Attributes:
        role: What it does: ``q``, ``gate``, ``n1``, ``q.bias`` ...
        name: Its name under the layer's prefix: ``self_attn.q_proj.weight``.
        in_space: The space its columns read from; None for one-dimensional tensors.
        out_space: The space its rows write to: residual, query_heads, key_heads, value_heads or neurons.
        follows: For biases and per-head norms: the role whose out space they live in.
        optional: A checkpoint may lack it (biases that a config switches).
        multiplies: It scales what it follows (a per-head norm's weight) instead of being added (a bias).
    """

    role: str
    name: str
    in_space: str | None = None
    out_space: str | None = None
    follows: str | None = None
    optional: bool = False
    multiplies: bool = False

    @property
    def writes_residual(self) -> bool:
        """Whether it adds to the residual stream: zeroing all such tensors of a layer makes it the identity."""
        return self.out_space == RESIDUAL and (self.in_space is not None or self.follows is not None)


@dataclass(frozen=True)
class Heads:
    """The attention heads of a model.

    Attributes:
        query: H, how many query heads.
        key_value: G, how many key-value heads; each serves H/G query heads that follow one another.
        size: h, components of a head.
        rotary: Which turns of a pair of components j, j + h/2 leave attention scores as they are: see `Architecture`.
    """

    query: int
    key_value: int
    size: int
    rotary: str = "none"

    @property
    def problem(self) -> str | None:
        """What is wrong with these numbers; None when nothing is."""
        if self.query % self.key_value:
            return f"{self.query} query heads do not divide among {self.key_value} key-value heads"
        return f"heads of size {self.size} have no rotary pairs" if self.size % 2 and self.rotary != "none" else None


@dataclass(frozen=True)
class Architecture:
    """A model family.

    Attributes:
        family: Its name.
        model_types: The ``model_type`` values of config.json it covers.
        layer: The tensors of a decoder layer, in the order alignment walks them.
        layer_prefix: The layer's prefix with ``{layer}`` for the index.
        before: Tensors in front of the layers.
        after: Tensors behind them.
        tied: Those of them that a checkpoint may lack, unless its config says that embeddings are not tied.
        ignored: Layer tensors of old checkpoints that today's models compute (rotary buffers): not carried over.
        layers_key: The key of config.json that holds the depth.
        rotary: How the pair of components j and j + h/2 of query and key may be turned together without changing what
            attention computes: ``phases``: by any angle, it commutes with the rotary embedding; ``signs``: by half a
            turn only, since per-head norm weights scale the two components differently; ``none``.
    """

    family: str
    model_types: tuple[str, ...]
    layer: tuple[TensorSpec, ...]
    layer_prefix: str = "model.layers.{layer}."
    before: tuple[str, ...] = ("model.embed_tokens.weight",)
    after: tuple[str, ...] = ("model.norm.weight", "lm_head.weight")
    tied: tuple[str, ...] = ("lm_head.weight",)
    ignored: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)
    layers_key: str = "num_hidden_layers"
    rotary: str = "none"

    @cached_property
    def roles(self) -> Mapping[str, TensorSpec]:
        return {spec.role: spec for spec in self.layer}


def families() -> Mapping[str, Architecture]:
    """Every described family, by file name."""
    return plugins("deus_merge.models.families", "ARCHITECTURE")
