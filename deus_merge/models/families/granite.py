"""Granite: a Llama layer with multipliers of attention scores and of what it adds to the residual stream."""

from ..family import Family
from ._pieces import llama_layer

FAMILY = Family("granite", ("granite",), llama_layer("q k v o gate up down"), rotary="phases")
