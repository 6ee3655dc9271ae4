"""Short text for messages."""

from __future__ import annotations

import pytest

from deus_merge.core.text import some_of


@pytest.mark.parametrize(
    ("items", "limit", "text"),
    [
        ([], 3, ""),
        (["a"], 3, "a"),
        (["a", "b", "c"], 3, "a, b, c"),
        (["a", "b", "c", "d"], 3, "a, b, c and 1 more"),
        (range(100), 5, "0, 1, 2, 3, 4 and 95 more"),
        ({"x": 1, "y": 2}, 1, "x and 1 more"),
    ],
)
def test_some_of(items, limit, text):
    assert some_of(items, limit) == text
