"""The text part of Qwen3-VL-MoE: Qwen3-MoE with the experts of a layer in 3-D tensors, stored either way up."""

from dataclasses import replace

from ..family import Family, Sublayer
from ..layouts import EitherWay
from ._pieces import mlp, router, stacked_experts
from .qwen3_moe import N2, SUBLAYERS

_WAYS = [
    stacked_experts("mlp.experts.gate_up_proj", "mlp.experts.down_proj", transposed=transposed)
    for transposed in (False, True)
]
_AXES = (("experts.gate_up", 2), ("experts.down", 1))
EXPERTS = tuple(
    replace(saved, layout=EitherWay(saved.layout, published.layout, _AXES))
    for saved, published in zip(*_WAYS, strict=True)
    if saved.layout and published.layout
)
FAMILY = Family(
    "qwen3_vl_moe",
    ("qwen3_vl_moe_text",),
    (SUBLAYERS[0], (Sublayer("mlp", (*N2, *mlp())), Sublayer("experts", (*N2, *router(), *EXPERTS)))),
    rotary="signs",
    unchecked=("neurons",),
)
