"""The tensors of a layer, the spaces that they connect, and its heads: all that alignment knows of a model."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property

from .layouts import Layout

RESIDUAL = "residual"
#: the place of an expert's number in names, roles and spaces
EXPERT = "{e}"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a decoder layer: one that is stored, or one of the matrices that a stored tensor consists of.

    Attributes:
        role: Its function in the layer: ``q``, ``gate``, ``n1``, ``q.bias``, ``experts.{e}.down`` ...
        name: Its name under the layer's prefix: ``self_attn.q_proj.weight``. ``{e}`` stands for the number of an
            expert, a final ``*`` for any rest, which is then also the role.
        in_space: The space its columns read from; None for vectors.
        out_space: The space its rows write to: residual, query_heads, gate_heads (what goes along with query heads
            and is never turned: gates of what they give, their rotary components), key_heads, value_heads,
            head_entries (one number a query head), rotary (components that all heads share), neurons
            (``neurons.{e}``: of one expert; ``neurons.query``: the latent components that queries are made from),
            experts.
        norm: The role of the norm whose output it reads; None where it reads the residual stream as it is.
        follows: For biases and norms of a weight's output: the role of that weight.
        optional: Whether a checkpoint may lack it (biases that a config enables).
        multiplies: Whether it scales the output that it follows (a norm's weight) instead of being added to it (a
            bias).
        offset: For norms: the scale is ``offset + weight``.
        one: Whether it scales what the whole layer computes, so that it must be 1 for the layer to be the identity.
        opaque: Whether nothing is known about its axes: a new layer takes it from one parent.
        layout: How it consists of several matrices, where it does.
    """

    role: str
    name: str
    in_space: str | None = None
    out_space: str | None = None
    norm: str | None = None
    follows: str | None = None
    optional: bool = False
    multiplies: bool = False
    offset: float = 0.0
    one: bool = False
    opaque: bool = False
    layout: Layout | None = None

    @property
    def writes_residual(self) -> bool:
        """Whether it adds to the residual stream: zeroing all such tensors of a layer makes it the identity. A norm
        behind such a tensor is none: it keeps zero zero, and its own zeros would stop every gradient."""
        return self.out_space == RESIDUAL and (
            self.in_space is not None or (self.follows is not None and not self.multiplies)
        )

    @property
    def group(self) -> str:
        """Its role without the number of an expert: ``experts.down``."""
        return group_of(self.role)

    def of_expert(self, index: int) -> TensorSpec:
        """The tensor of one expert, where this describes those of all."""
        parts = ("role", "name", "in_space", "out_space", "norm", "follows")
        found = {part: getattr(self, part) for part in parts}
        return replace(self, **{part: text.replace(EXPERT, str(index)) for part, text in found.items() if text})

    @cached_property
    def pattern(self) -> re.Pattern | None:
        """A regular expression for its names, where there are several."""
        if EXPERT not in self.name and not self.name.endswith("*"):
            return None
        text = re.escape(self.name.removesuffix("*")).replace(re.escape(EXPERT), r"(?P<e>0|[1-9][0-9]{0,5})")
        return re.compile(text + (".*" if self.name.endswith("*") else ""), re.DOTALL)


def group_of(role: str) -> str:
    """A role without the number of an expert."""
    return re.sub(r"\.(\d+|\{e\})(?=\.)", "", role)


@dataclass(frozen=True)
class Heads:
    """The attention heads of a layer.

    Attributes:
        query: Number of query heads, H.
        key_value: Number of key-value heads, G; each serves H/G consecutive query heads.
        size: Components of a query or key head, h; with latent attention those that are not rotary.
        value_size: Components of a value head, where it is another number.
        rotary: The rotations of a rotary pair of components that leave attention scores unchanged: see `Family`.
        rotary_size: The first r components are rotary; None for all of them.
        interleaved: Whether components 2j and 2j + 1 are a pair, and not j and j + r/2.
        without: Steps of ``alignment: symmetry`` that would change the function of such a layer.
        expert_groups: Groups of consecutive experts that a router chooses first.
    """

    query: int
    key_value: int
    size: int
    rotary: str = "none"
    rotary_size: int | None = None
    interleaved: bool = False
    without: frozenset[str] = frozenset()
    expert_groups: int = 1
    value_size: int | None = None

    @property
    def values(self) -> int:
        """Components of a value head."""
        return self.size if self.value_size is None else self.value_size

    @property
    def mismatch(self) -> str | None:
        """The reason why these numbers do not fit together; None when they do."""
        if self.query % self.key_value:
            return f"{self.query} query heads do not divide among {self.key_value} key-value heads"
        rotary = self.size if self.rotary_size is None else self.rotary_size
        return f"heads of size {self.size} have no rotary pairs" if rotary % 2 and self.rotary != "none" else None
