"""A.X K1: DeepSeek-V3's layers with one more norm, of what the experts write."""

from ..family import Family
from ._pieces import mlp_or_experts, norm
from .deepseek_v3 import CASES, LATENT_ATTENTION, WITHOUT

N2 = norm("n2", "post_attention_layernorm")
DENSE, *_ = mlp_or_experts(N2)
_, *SPARSE = mlp_or_experts(N2, behind="post_mlp_layernorm")
FAMILY = Family(
    "axk1", ("axk1",), (LATENT_ATTENTION, (DENSE, *SPARSE)), without=WITHOUT, cases=CASES, unchecked=("value_heads",)
)
