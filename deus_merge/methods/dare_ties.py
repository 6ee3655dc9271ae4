"""Drop and rescale, then merge by sign."""

from __future__ import annotations

from .dare_linear import DareLinear


class DareTies(DareLinear):
    name = "dare_ties"
    summary = "task vectors with random elements dropped and the rest scaled up, merged where their signs agree"
    consensus = True


METHOD = DareTies()
