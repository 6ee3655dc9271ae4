"""Phrases that several messages share."""

from __future__ import annotations

from collections.abc import Iterable


def some_of(items: Iterable[object], limit: int = 5) -> str:
    """The first few items as one phrase: ``"a, b, c and 4 more"``.

    Args:
        items: The items, in the order in which they are shown.
        limit: How many are shown at most.
    """
    texts = [str(item) for item in items]
    rest = len(texts) - limit
    return ", ".join(texts[:limit]) + (f" and {rest} more" if rest > 0 else "")
