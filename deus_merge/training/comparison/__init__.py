"""Comparisons of ways to grow a model, and of ways to train it: on any model, with any text."""

from .options import Budget, CompareOptions, parse_budget
from .result import Comparison
from .run import compare

__all__ = ["Budget", "CompareOptions", "Comparison", "compare", "parse_budget"]
