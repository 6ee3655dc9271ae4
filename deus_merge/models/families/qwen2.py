"""Qwen2 and Qwen2.5: a Llama layer with biases on q, k and v."""

from ..family import Family
from ._decoder import decoder_layer

FAMILY = Family("qwen2", ("qwen2",), decoder_layer(biases="q k v"), rotary="phases")
