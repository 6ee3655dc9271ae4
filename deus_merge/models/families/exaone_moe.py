"""EXAONE-MoE: Qwen3's attention; the router's correction bias beside the router."""

from ..family import Family
from ._pieces import mlp_or_experts
from .glm4_moe import ATTENTION_KINDS, N2

FAMILY = Family(
    "exaone_moe", ("exaone_moe",), (ATTENTION_KINDS, mlp_or_experts(N2, bias="e_score_correction_bias")), rotary="signs"
)
