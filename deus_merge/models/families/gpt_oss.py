"""GPT-OSS: experts in 3-D tensors stored as (inputs, outputs), gate and up in turn; attention sinks, biases."""

from ..family import Family, Sublayer
from ..layouts import Alternating
from ..spec import TensorSpec
from ._pieces import attention, norm, router, stacked_experts

SUBLAYERS = (
    (
        Sublayer(
            "attention",
            (
                *norm("n1", "input_layernorm"),
                *attention(biases="q k v o"),
                TensorSpec("sinks", "self_attn.sinks", None, "head_entries"),
            ),
        ),
    ),
    (
        Sublayer(
            "experts",
            (
                *norm("n2", "post_attention_layernorm"),
                *router("mlp.router.weight", bias="mlp.router.bias"),
                *stacked_experts(
                    "mlp.experts.gate_up_proj", "mlp.experts.down_proj",
                    transposed=True, layout=Alternating, biases=True,
                ),
            ),
        ),
    ),
)  # fmt: skip
FAMILY = Family("gpt_oss", ("gpt_oss",), SUBLAYERS, rotary="phases", unchecked=("neurons",))
