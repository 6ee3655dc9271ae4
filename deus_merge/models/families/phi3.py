"""Phi-3 and Phi-4: q, k and v in one tensor, gate and up in another."""

from ..family import Family, Sublayer
from ..layouts import Stacked
from ._pieces import fused, norm, projection

SUBLAYERS = (
    (
        Sublayer(
            "attention",
            (
                *norm("n1", "input_layernorm"),
                *fused("qkv", "self_attn.qkv_proj.weight", Stacked, ("q", "k", "v"), norm="n1"),
                *projection("o", "self_attn.o_proj", norm=None),
            ),
        ),
    ),
    (
        Sublayer(
            "mlp",
            (
                *norm("n2", "post_attention_layernorm"),
                *fused("gate_up", "mlp.gate_up_proj.weight", Stacked, ("gate", "up"), norm="n2"),
                *projection("down", "mlp.down_proj", norm=None),
            ),
        ),
    ),
)
FAMILY = Family("phi3", ("phi3",), SUBLAYERS, rotary="phases")
