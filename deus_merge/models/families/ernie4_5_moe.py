"""ERNIE 4.5 with experts: a correction bias (1, E), and one expert that every token takes."""

from dataclasses import replace

from ..family import Family, Sublayer
from ..layouts import Flattened
from ..spec import TensorSpec
from ._pieces import attention, mlp_or_experts, norm


def _flat(spec: TensorSpec) -> TensorSpec:
    bias = spec.role == "router.bias"
    return TensorSpec(spec.role, spec.name, optional=True, layout=Flattened(spec)) if bias else spec


KINDS = mlp_or_experts(
    norm("n2", "post_attention_layernorm"), bias="moe_statics.e_score_correction_bias", biases="gate up down"
)
ATTENTION = Sublayer("attention", (*norm("n1", "input_layernorm"), *attention(biases="q k v o")))
SUBLAYERS = ((ATTENTION,), tuple(replace(kind, tensors=tuple(map(_flat, kind.tensors))) for kind in KINDS))
FAMILY = Family("ernie4_5_moe", ("ernie4_5_moe",), SUBLAYERS, rotary="phases", interleaved=True)
