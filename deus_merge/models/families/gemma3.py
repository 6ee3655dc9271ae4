"""Gemma 3: Gemma 2 with queries and keys normalised per head."""

from ..family import Family
from ._pieces import HEAD_NORMS, llama_layer
from .gemma2 import BEHIND, FRONT

FAMILY = Family(
    "gemma3",
    ("gemma3_text",),
    llama_layer("q k v o", HEAD_NORMS, norms=FRONT, behind=BEHIND, offset=1.0),
    rotary="signs",
)
