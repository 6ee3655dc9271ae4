"""Persimmon: q, k and v of each head in turn in one tensor, queries and keys normalised per head, no gate."""

from ..family import Family, Sublayer
from ..layouts import PerGroup
from ._pieces import fused, head_layer_norm, mlp, norm, projection

SUBLAYERS = (
    (
        Sublayer(
            "attention",
            (
                *norm("n1", "input_layernorm", bias=True),
                *fused("qkv", "self_attn.query_key_value.weight", PerGroup, ("q", "k", "v"), norm="n1",
                       bias="self_attn.query_key_value.bias"),
                *head_layer_norm("q", "self_attn.q_layernorm"),
                *head_layer_norm("k", "self_attn.k_layernorm"),
                *projection("o", "self_attn.dense", norm=None, bias=True),
            ),
        ),
    ),
    (
        Sublayer(
            "mlp",
            (
                *norm("n2", "post_attention_layernorm", bias=True),
                *mlp({"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}, biases="up down"),
            ),
        ),
    ),
)  # fmt: skip
FAMILY = Family(
    "persimmon",
    ("persimmon",),
    SUBLAYERS,
    after=("model.final_layernorm.weight", "model.final_layernorm.bias", "lm_head.weight"),
    rotary="phases",
    rotary_share=0.5,
    without={"rotary": "per-head norms subtract the mean of a head's components"},
)
