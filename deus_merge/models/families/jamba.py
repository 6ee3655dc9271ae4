"""Jamba: Bamba's layers, some with experts; attention without positions."""

from ..family import Family
from .bamba import AFTER, SUBLAYERS

FAMILY = Family("jamba", ("jamba",), SUBLAYERS, after=AFTER)
