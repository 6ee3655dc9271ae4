"""ERNIE 4.5: a Llama layer whose rotary pairs are adjacent components; in some layers experts and one for all tokens."""

from ..family import Family
from ._pieces import llama_layer

FAMILY = Family(
    "ernie4_5", ("ernie4_5",), llama_layer(biases="q k v o gate up down"), rotary="phases", interleaved=True
)
