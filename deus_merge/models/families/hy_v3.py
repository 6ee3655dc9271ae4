"""Hunyuan 3: Qwen3's attention, experts with a correction bias and one that every token takes, a dense layer first."""

from ..family import Family
from ._pieces import mlp_or_experts
from .glm4_moe import ATTENTION_KINDS, N2

KINDS = mlp_or_experts(N2, gate="router.gate", bias="expert_bias", shared="shared_mlp", biases="gate up down")
FAMILY = Family("hy_v3", ("hy_v3",), (ATTENTION_KINDS, KINDS), rotary="signs")
