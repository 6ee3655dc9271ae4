"""MiniMax-M2: queries and keys normalised over all heads, partly rotary; experts with a correction bias."""

from ..family import Family, Sublayer
from ._pieces import HEAD_NORMS, attention, experts, gated, norm, router

N2 = norm("n2", "post_attention_layernorm")
EXPERTS = gated("block_sparse_moe.experts.{e}", "w1", "w3", "w2")
ROUTER = router("block_sparse_moe.gate.weight", bias="block_sparse_moe.e_score_correction_bias")
SUBLAYERS = (
    (Sublayer("attention", (*norm("n1", "input_layernorm"), *attention(head_norms=HEAD_NORMS))),),
    (Sublayer("experts", (*N2, *ROUTER, *experts(EXPERTS))),),
)
FAMILY = Family("minimax_m2", ("minimax_m2",), SUBLAYERS, rotary="signs")
