"""CodeGen: GPT-J with q, v and k in one tensor, in four blocks of heads."""

from dataclasses import replace

from ..family import Sublayer
from ..layouts import InBlocks
from ._pieces import fused, norm, projection
from .gptj import FAMILY as GPTJ
from .gptj import MLP

ATTENTION = (
    *norm("n1", "ln_1", bias=True),
    *fused("qkv", "attn.qkv_proj.weight", InBlocks, ("q", "v", "k"), norm="n1"),
    *projection("o", "attn.out_proj", norm=None),
)
FAMILY = replace(
    GPTJ,
    name="codegen",
    model_types=("codegen",),
    sublayers=((Sublayer("attention", ATTENTION),), (Sublayer("mlp", MLP),)),
    ignored=("attn.causal_mask",),
)
