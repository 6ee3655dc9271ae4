"""GPT-2: matrices stored as (inputs, outputs), q, k and v in one of them, biases everywhere, learned positions."""

from ..family import Family, Sublayer
from ..layouts import Stacked
from ._pieces import fused, norm, transposed

SUBLAYERS = (
    (
        Sublayer(
            "attention",
            (
                *norm("n1", "ln_1", bias=True),
                *fused(
                    "qkv", "attn.c_attn.weight", Stacked, ("q", "k", "v"),
                    norm="n1", transposed=True, bias="attn.c_attn.bias",
                ),
                *transposed("o", "attn.c_proj"),
            ),
        ),
    ),
    (Sublayer("mlp", (*norm("n2", "ln_2", bias=True), *transposed("up", "mlp.c_fc", norm="n2"),
                      *transposed("down", "mlp.c_proj"))),),
)  # fmt: skip
FAMILY = Family(
    "gpt2",
    ("gpt2",),
    SUBLAYERS,
    layer_prefix="transformer.h.{layer}.",
    before=("transformer.wte.weight", "transformer.wpe.weight"),
    after=("transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"),
    ignored=("attn.bias", "attn.masked_bias"),
    layers_key="n_layer",
)
