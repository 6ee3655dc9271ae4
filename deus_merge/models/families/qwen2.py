"""Qwen2 and Qwen2.5, also as the text part of vision-language models: a Llama layer with biases on q, k and v."""

from ..family import Family
from ._pieces import llama_layer

FAMILY = Family("qwen2", ("qwen2", "qwen2_vl_text", "qwen2_5_vl_text"), llama_layer(biases="q k v"), rotary="phases")
