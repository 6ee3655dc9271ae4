"""Granite with experts in 3-D tensors, with an MLP for every token beside them or alone, and with Mamba layers."""

from ..family import Family, Sublayer
from ..layouts import Stacked
from ._pieces import attention, fused, mixer, norm, projection, router, stacked_experts

N1, N2 = norm("n1", "input_layernorm"), norm("n2", "post_attention_layernorm")
SHARED = (
    *fused("shared.gate_up", "shared_mlp.input_linear.weight", Stacked, ("gate", "up"), norm="n2", prefix="shared.",
           space="neurons.shared"),
    *projection("shared.down", "shared_mlp.output_linear", norm=None, space="neurons.shared"),
)  # fmt: skip
EXPERTS = (
    *router("block_sparse_moe.router.layer.weight"),
    *stacked_experts("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
)
SUBLAYERS = (
    (
        Sublayer("attention", (*N1, *attention(biases="q k v o"))),
        Sublayer("mamba", (*N1, *mixer("mamba.", writers=("mamba.out_proj.weight", "mamba.out_proj.bias")))),
    ),
    (
        Sublayer("experts", (*N2, *EXPERTS)),
        Sublayer("experts", (*N2, *EXPERTS, *SHARED)),
        Sublayer("mlp", (*N2, *SHARED)),
    ),
)
FAMILY = Family(
    "granitemoe", ("granitemoe", "granitemoeshared", "granitemoehybrid"), SUBLAYERS, rotary="phases",
    unchecked=("neurons",),
)  # fmt: skip
