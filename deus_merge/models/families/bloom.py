"""BLOOM: q, k and v of each head in turn in one tensor, ALiBi, LayerNorms with biases, no gate."""

from ..family import Case, Family, Sublayer
from ..layouts import PerGroup
from ._pieces import fused, mlp, norm, projection

SUBLAYERS = (
    (
        Sublayer(
            "attention",
            (
                *norm("n1", "input_layernorm", bias=True),
                *fused("qkv", "self_attention.query_key_value.weight", PerGroup, ("q", "k", "v"), norm="n1",
                       bias="self_attention.query_key_value.bias"),
                *projection("o", "self_attention.dense", norm=None, bias=True),
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
    "bloom",
    ("bloom",),
    SUBLAYERS,
    layer_prefix="transformer.h.{layer}.",
    before=("transformer.word_embeddings.weight",),
    after=("transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"),
    layers_key="n_layer",
    without={"heads": "ALiBi slopes go by the number of a head"},
    cases=(Case("apply_residual_connection_post_layernorm", no_identity="it adds to what its norms give"),),
)
