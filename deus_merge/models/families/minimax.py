"""MiniMax-01 and M1: lightning attention and softmax attention, experts; the residual is taken behind the norm."""

from ..family import Family, Sublayer
from ._pieces import attention, experts, mixer, norm, router
from .minimax_m2 import EXPERTS, N2

N1 = norm("n1", "input_layernorm")
SUBLAYERS = (
    (
        Sublayer("attention", (*N1, *attention())),
        Sublayer("lightning attention", (*N1, *mixer("self_attn.", writers=("self_attn.out_proj.weight",)))),
    ),
    (Sublayer("experts", (*N2, *router("block_sparse_moe.gate.weight"), *experts(EXPERTS))),),
)
FAMILY = Family(
    "minimax", ("minimax",), SUBLAYERS, rotary="phases",
    no_identity="the residual stream goes through the norms of every layer",
)  # fmt: skip
