"""GPT-BigCode (StarCoder, SantaCoder): GPT-2 with one key-value head, or q, k and v of each head in turn."""

from ..family import Family, Sublayer
from ..layouts import PerGroup
from ._pieces import fused, mlp, norm, projection

SUBLAYERS = (
    (
        Sublayer(
            "attention",
            (
                *norm("n1", "ln_1", bias=True),
                *fused("qkv", "attn.c_attn.weight", PerGroup, ("q", "k", "v"), norm="n1", bias="attn.c_attn.bias"),
                *projection("o", "attn.c_proj", norm=None, bias=True),
            ),
        ),
    ),
    (
        Sublayer(
            "mlp",
            (*norm("n2", "ln_2", bias=True), *mlp({"up": "mlp.c_fc", "down": "mlp.c_proj"}, biases="up down")),
        ),
    ),
)
FAMILY = Family(
    "gpt_bigcode",
    ("gpt_bigcode",),
    SUBLAYERS,
    layer_prefix="transformer.h.{layer}.",
    before=("transformer.wte.weight", "transformer.wpe.weight"),
    after=("transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"),
    ignored=("attn.bias", "attn.masked_bias"),
    layers_key="n_layer",
)
