"""Qwen2 and Qwen2.5: a Llama layer with biases on q, k and v."""

from ..family import Architecture
from ._decoder import decoder_layer

ARCHITECTURE = Architecture("qwen2", ("qwen2",), decoder_layer(biases="q k v"), rotary="phases")
