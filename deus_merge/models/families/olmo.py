"""OLMo: a Llama layer whose norms have no tensors; queries, keys and values may be clipped."""

from ..family import Case, Family, Sublayer
from ._pieces import attention, mlp

_CUT = "clip_qkv cuts each component by itself"
SUBLAYERS = (
    (Sublayer("attention", attention(norm=None, biases="q k v o")),),
    (Sublayer("mlp", mlp(norm=None)),),
)
FAMILY = Family(
    "olmo",
    ("olmo",),
    SUBLAYERS,
    after=("lm_head.weight",),
    rotary="phases",
    cases=(Case("clip_qkv", {"values": _CUT, "rotary": _CUT}),),
)
