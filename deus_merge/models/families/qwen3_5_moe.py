"""Qwen3.5-MoE: Qwen3.5 with experts, published in 3-D tensors and saved one by one, and a gated expert for all."""

from ..family import Family, Sublayer
from ._pieces import experts, router, stacked_experts
from .qwen2_moe import SHARED
from .qwen3_5 import MIXERS, N2, WITHOUT

FUSED = stacked_experts("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
EXPERTS = tuple(Sublayer("experts", (*N2, *router(), *own, *SHARED)) for own in (experts(), FUSED))
FAMILY = Family(
    "qwen3_5_moe",
    ("qwen3_5_moe_text",),
    (MIXERS, EXPERTS),
    rotary="signs",
    rotary_share=0.25,
    without=WITHOUT,
    unchecked=("neurons", "neurons.shared"),
)
