"""Mistral and Ministral, also as the text part of Mistral 3: a Llama layer without biases."""

from ..family import Family
from ._pieces import llama_layer

FAMILY = Family("mistral", ("mistral", "ministral", "ministral3"), llama_layer(), rotary="phases")
