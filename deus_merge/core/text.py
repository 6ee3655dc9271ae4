"""Short text for messages."""

from __future__ import annotations

from collections.abc import Iterable


def some_of(items: Iterable[object], limit: int = 5) -> str:
    """The first ``limit`` items as one line of text, and how many more there are.

    Args:
        items: Anything with a text form.
        limit: How many items are shown.

    Returns:
        ``"a, b and 3 more"``; an empty string for no items.
    """
    texts = [str(item) for item in items]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def plural(count: int, noun: str) -> str:
    """``1, "layer"`` -> ``"1 layer"``; ``3, "layer"`` -> ``"3 layers"``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
