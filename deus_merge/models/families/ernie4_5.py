"""ERNIE 4.5: a Llama layer with biases, whose rotary pairs are adjacent components."""

from ..family import Family
from ._pieces import llama_layer

LAYER = llama_layer(biases="q k v o gate up down")
FAMILY = Family("ernie4_5", ("ernie4_5",), LAYER, rotary="phases", interleaved=True)
