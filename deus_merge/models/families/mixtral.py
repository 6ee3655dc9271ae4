"""Mixtral: a Llama layer with experts in place of the MLP, a tensor for each role of each."""

from ..family import Family, Sublayer
from ._pieces import attention, experts, norm, router

MODULES = {
    "gate": "block_sparse_moe.experts.{e}.w1",
    "up": "block_sparse_moe.experts.{e}.w3",
    "down": "block_sparse_moe.experts.{e}.w2",
}
N2 = norm("n2", "post_attention_layernorm")
SUBLAYERS = (
    (Sublayer("attention", (*norm("n1", "input_layernorm"), *attention())),),
    (Sublayer("experts", (*N2, *router("block_sparse_moe.gate.weight"), *experts(MODULES))),),
)
FAMILY = Family("mixtral", ("mixtral",), SUBLAYERS, rotary="phases")
