"""Qwen2 and Qwen2.5: a Llama layer with biases on q, k and v."""

from ..family import Family
from ._pieces import llama_layer

FAMILY = Family("qwen2", ("qwen2",), llama_layer(biases="q k v"), rotary="phases")
