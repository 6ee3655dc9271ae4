"""Qwen 4 (experimental): linear and indexed attention, experts, several residual streams to which each half adds."""

from ..family import Family, Sublayer
from ..spec import RESIDUAL, TensorSpec
from ._pieces import experts, gated, mixer, mlp, router, stacked_experts

LINEAR = mixer("linear_attn.", "attn_hyper_connection.", writers=("linear_attn.out_proj.weight",))
INDEXED = mixer("self_attn.", "attn_hyper_connection.", writers=("self_attn.o_proj.weight", "self_attn.o_proj.bias"))
STREAMS = (TensorSpec("mlp_hyper_connection.*", "mlp_hyper_connection.*", opaque=True), *router(norm=None))
STACKED = stacked_experts("mlp.experts.gate_up_proj", "mlp.experts.down_proj", norm=None)
SHARED = (
    *mlp(gated("mlp.shared_expert"), norm=None, prefix="shared."),
    TensorSpec("shared.router", "mlp.shared_expert_gate.weight", RESIDUAL, "share"),
)
PER_LAYER = TensorSpec("ple.*", "ple.*", opaque=True, optional=True)
SUBLAYERS = (
    (Sublayer("linear attention", (PER_LAYER, *LINEAR)), Sublayer("indexed attention", (PER_LAYER, *INDEXED))),
    (
        Sublayer("experts", (*STREAMS, *experts(norm=None), *SHARED)),
        Sublayer("experts", (*STREAMS, *STACKED, *SHARED)),
    ),
)
FAMILY = Family("qwen4_exp", ("qwen4_exp_text",), SUBLAYERS, after=("lm_head.weight",))
