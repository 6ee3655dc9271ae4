"""Arcee: a Llama layer whose MLP has no gate."""

from ..family import Family
from ._pieces import PLAIN_MLP, llama_layer

FAMILY = Family("arcee", ("arcee",), llama_layer("q k v o up down", mlp_modules=PLAIN_MLP), rotary="phases")
