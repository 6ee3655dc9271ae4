"""The description of a model family as data: the tensors of a decoder layer and the spaces that they connect.

A family is one file in ``families/``, and `families` is their registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from ..core.plugins import plugins
from .facts.base import Rule

RESIDUAL = "residual"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a decoder layer.

    Attributes:
        role: Its function in the layer: ``q``, ``gate``, ``n1``, ``q.bias`` ...
        name: Its name under the layer's prefix: ``self_attn.q_proj.weight``.
        in_space: The space its columns read from; None for one-dimensional tensors.
        out_space: The space its rows write to: residual, query_heads, key_heads, value_heads or neurons.
        follows: For biases and per-head norms: the role whose output they act on.
        optional: Whether a checkpoint may lack it (biases that a config enables).
        multiplies: Whether it scales the output that it follows (a per-head norm's weight) instead of being added to
            it (a bias).
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
        query: Number of query heads, H.
        key_value: Number of key-value heads, G; each serves H/G consecutive query heads.
        size: Components of a head, h.
        rotary: The rotations of a pair of components j, j + h/2 that leave attention scores unchanged: see `Family`.
    """

    query: int
    key_value: int
    size: int
    rotary: str = "none"

    @property
    def mismatch(self) -> str | None:
        """The reason why these numbers do not fit together; None when they do."""
        if self.query % self.key_value:
            return f"{self.query} query heads do not divide among {self.key_value} key-value heads"
        return f"heads of size {self.size} have no rotary pairs" if self.size % 2 and self.rotary != "none" else None


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: Its name, which is also its file's.
        model_types: The ``model_type`` values of config.json that it covers.
        layer: The tensors of a decoder layer, in the order in which alignment processes them.
        layer_prefix: The layer's prefix with ``{layer}`` for the index.
        before: Tensors before the layers.
        after: Tensors after the layers.
        tied: Tensors of ``before`` and ``after`` that a checkpoint may lack, unless its config says that embeddings are
            not tied.
        ignored: Layer tensors of old checkpoints that current models compute (rotary buffers): not written to outputs.
        layers_key: The key of config.json that holds the depth.
        rotary: The rotations of components j and j + h/2 of query and key that leave the function of attention
            unchanged. ``phases``: by any angle, since they commute with the rotary embedding; ``signs``: by half a turn
            only, since per-head norm weights scale the two components differently; ``none``.
        facts: The rules by which its configs say of what kind each layer is, where these are not known by
            ``model_type`` or by the keys: see `layer_facts`.
    """

    name: str
    model_types: tuple[str, ...]
    layer: tuple[TensorSpec, ...]
    layer_prefix: str = "model.layers.{layer}."
    before: tuple[str, ...] = ("model.embed_tokens.weight",)
    after: tuple[str, ...] = ("model.norm.weight", "lm_head.weight")
    tied: tuple[str, ...] = ("lm_head.weight",)
    ignored: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)
    layers_key: str = "num_hidden_layers"
    rotary: str = "none"
    facts: tuple[Rule, ...] = ()

    @cached_property
    def roles(self) -> Mapping[str, TensorSpec]:
        """The layer's tensors by role."""
        return {spec.role: spec for spec in self.layer}


def families() -> Mapping[str, Family]:
    """Every described family, by file name."""
    return cast(Mapping[str, Family], plugins("deus_merge.models.families", "FAMILY"))
