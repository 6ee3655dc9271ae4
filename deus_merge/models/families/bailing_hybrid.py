"""Ling 2.5 (Bailing): delta attention and latent attention, experts in groups, dense layers first."""

from ..family import Case, Family, Sublayer
from ._pieces import UNKNOWN_GROUPS, mixer, mlp_or_experts, norm

WRITERS = ("attention.dense.weight", "attention.dense.bias")
SUBLAYERS = (
    (Sublayer("mixer", (*norm("n1", "input_layernorm"), *mixer("attention.", writers=WRITERS))),),
    mlp_or_experts(norm("n2", "post_attention_layernorm"), bias="gate.expert_bias"),
)
FAMILY = Family(
    "bailing_hybrid",
    ("bailing_hybrid",),
    SUBLAYERS,
    before=("model.word_embeddings.weight",),
    cases=(Case("num_expert_group", UNKNOWN_GROUPS, when=False),),
)
