"""Mistral: a Llama layer without biases. Its config.json decides on sliding attention."""

from ..family import Family
from ._pieces import llama_layer

FAMILY = Family("mistral", ("mistral",), llama_layer(), rotary="phases")
