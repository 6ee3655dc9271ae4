"""OLMoE: experts in place of the MLP; queries and keys normalised over all heads, which may be clipped."""

from ..family import Case, Family, Sublayer
from ._pieces import HEAD_NORMS, attention, experts, norm, router

SUBLAYERS = (
    (Sublayer("attention", (*norm("n1", "input_layernorm"), *attention(biases="q k v o", head_norms=HEAD_NORMS))),),
    (Sublayer("experts", (*norm("n2", "post_attention_layernorm"), *router(), *experts())),),
)
CLIPPED = Case("clip_qkv", {"values": "clip_qkv cuts each component by itself"})
FAMILY = Family("olmoe", ("olmoe",), SUBLAYERS, rotary="signs", cases=(CLIPPED,))
