"""Nemotron and Minitron: LayerNorms with scales 1 + w, an MLP without a gate, half of each head rotary."""

from ..family import Family
from ._pieces import PLAIN_MLP, llama_layer

FAMILY = Family(
    "nemotron",
    ("nemotron",),
    llama_layer("q k v o up down", mlp_modules=PLAIN_MLP, norm_bias=True, offset=1.0),
    after=("model.norm.weight", "model.norm.bias", "lm_head.weight"),
    rotary="phases",
    rotary_share=0.5,
)
