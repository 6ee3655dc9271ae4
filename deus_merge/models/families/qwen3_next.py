"""Qwen3-Next: Qwen3.5's kinds of layers with experts, a tensor for each role of each, in some layers or all."""

from ..family import Family, Sublayer
from ._pieces import experts, mlp, router
from .qwen2_moe import SHARED
from .qwen3_5 import MIXERS, N2, WITHOUT

FAMILY = Family(
    "qwen3_next",
    ("qwen3_next",),
    (MIXERS, (Sublayer("mlp", (*N2, *mlp())), Sublayer("experts", (*N2, *router(), *experts(), *SHARED)))),
    rotary="signs",
    rotary_share=0.25,
    without=WITHOUT,
    unchecked=("neurons.shared",),
)
