"""Llama 1 to 3, SmolLM, TinyLlama: every model with ``model_type: llama``. Biases exist where a config enables them."""

from ..family import Family
from ._pieces import llama_layer

FAMILY = Family("llama", ("llama",), llama_layer(biases="q k v o gate up down"), rotary="phases")
