"""EXAONE 4: OLMo 2's norms behind attention and MLP; queries and keys normalised per head."""

from ..family import Family
from .olmo2 import SUBLAYERS

FAMILY = Family("exaone4", ("exaone4",), SUBLAYERS, rotary="signs")
