"""Gemma: a Llama layer whose norms have scales 1 + w."""

from ..family import Family
from ._pieces import llama_layer

FAMILY = Family("gemma", ("gemma",), llama_layer("q k v o", offset=1.0), rotary="phases")
