"""Short texts for messages."""

from __future__ import annotations

from collections.abc import Iterable


def some_of(items: Iterable[object], limit: int = 5) -> str:
    """The first items of a list, and the number of the others.

    Args:
        items: What to name.
        limit: How many are named at most.

    Returns:
        ``a, b, c and 4 more``.
    """
    texts = [str(item) for item in items]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more
