"""MiniCPM 3 and Youtu: DeepSeek's latent attention with a gated MLP."""

from ..family import Family, Sublayer
from ._pieces import mlp, norm
from .deepseek_v3 import LATENT_ATTENTION, WITHOUT

MLP = Sublayer("mlp", (*norm("n2", "post_attention_layernorm"), *mlp(biases="gate up down")))
FAMILY = Family(
    "minicpm3", ("minicpm3", "youtu"), (LATENT_ATTENTION, (MLP,)), without=WITHOUT, unchecked=("value_heads",)
)
