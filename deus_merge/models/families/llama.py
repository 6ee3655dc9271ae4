"""Llama 1 to 3, SmolLM, TinyLlama: whatever says ``model_type: llama``; biases where a config has them."""

from ..family import Architecture
from ._decoder import decoder_layer

ARCHITECTURE = Architecture("llama", ("llama",), decoder_layer(biases="q k v o gate up down"), rotary="phases")
