"""Phi-3.5-MoE: norms with biases, experts named as in Mixtral, and perhaps a bias of the head."""

from ..family import Family, Sublayer
from ._pieces import attention, experts, norm, router
from .minimax_m2 import EXPERTS

SUBLAYERS = (
    (Sublayer("attention", (*norm("n1", "input_layernorm", bias=True), *attention(biases="q k v o"))),),
    (
        Sublayer(
            "experts",
            (
                *norm("n2", "post_attention_layernorm", bias=True),
                *router("block_sparse_moe.gate.weight"),
                *experts(EXPERTS),
            ),
        ),
    ),
)
FAMILY = Family(
    "phimoe", ("phimoe",), SUBLAYERS, rotary="phases", after=("model.norm.weight", "model.norm.bias", "lm_head.weight")
)
