"""The text part of Qwen3-VL-MoE: Qwen3-MoE with the experts of a layer in 3-D tensors stored as (inputs, outputs)."""

from ..family import Family, Sublayer
from ._pieces import mlp, router, stacked_experts
from .qwen3_moe import N2, SUBLAYERS

EXPERTS = stacked_experts("mlp.experts.gate_up_proj", "mlp.experts.down_proj", transposed=True)
FAMILY = Family(
    "qwen3_vl_moe",
    ("qwen3_vl_moe_text",),
    (SUBLAYERS[0], (Sublayer("mlp", (*N2, *mlp())), Sublayer("experts", (*N2, *router(), *EXPERTS)))),
    rotary="signs",
    unchecked=("neurons",),
)
