"""Mistral: a Llama layer without biases; sliding attention is a matter of its config."""

from ..family import Architecture
from ._decoder import decoder_layer

ARCHITECTURE = Architecture("mistral", ("mistral",), decoder_layer(), rotary="phases")
