"""MPT: q, k and v in one tensor, which may be clipped; ALiBi, no biases, no gate."""

from ..family import Case, Family, Sublayer
from ..layouts import Stacked
from ._pieces import fused, mlp, norm, projection

SUBLAYERS = (
    (
        Sublayer(
            "attention",
            (
                *norm("n1", "norm_1"),
                *fused("qkv", "attn.Wqkv.weight", Stacked, ("q", "k", "v"), norm="n1"),
                *projection("o", "attn.out_proj", norm=None),
            ),
        ),
    ),
    (Sublayer("mlp", (*norm("n2", "norm_2"), *mlp({"up": "ffn.up_proj", "down": "ffn.down_proj"}))),),
)
FAMILY = Family(
    "mpt",
    ("mpt",),
    SUBLAYERS,
    layer_prefix="transformer.blocks.{layer}.",
    before=("transformer.wte.weight",),
    after=("transformer.norm_f.weight", "lm_head.weight"),
    layers_key="n_layers",
    without={"heads": "ALiBi slopes go by the number of a head"},
    cases=(Case("attn_config.clip_qkv", {"values": "clip_qkv cuts each component by itself"}),),
)
