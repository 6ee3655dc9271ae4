"""Solar Open: Llama's attention; experts with correction biases, and one that every token takes."""

from ..family import Family
from ._pieces import mlp_or_experts
from .glm4_moe import ATTENTION_KINDS, N2

FAMILY = Family("solar_open", ("solar_open",), (ATTENTION_KINDS[1:], mlp_or_experts(N2)), rotary="phases")
