"""GPT-NeoX and Pythia: q, k and v of each head in turn in one tensor; attention and MLP mostly in parallel."""

from ..family import Family, Sublayer
from ..layouts import PerGroup
from ._pieces import fused, mlp, norm, projection

#: both norms read what the layer reads where attention and MLP are in parallel
SUBLAYERS = (
    (Sublayer("", (*norm("n1", "input_layernorm", bias=True), *norm("n2", "post_attention_layernorm", bias=True))),),
    (
        Sublayer(
            "attention",
            (
                *fused("qkv", "attention.query_key_value.weight", PerGroup, ("q", "k", "v"), norm="n1",
                       bias="attention.query_key_value.bias"),
                *projection("o", "attention.dense", norm=None, bias=True),
            ),
        ),
    ),
    (Sublayer("mlp", mlp({"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}, biases="up down")),),
)  # fmt: skip
FAMILY = Family(
    "gpt_neox",
    ("gpt_neox",),
    SUBLAYERS,
    layer_prefix="gpt_neox.layers.{layer}.",
    before=("gpt_neox.embed_in.weight",),
    after=("gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias", "embed_out.weight"),
    tied=("embed_out.weight",),
    ignored=("attention.rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
    rotary="phases",
    rotary_share=0.25,
)
