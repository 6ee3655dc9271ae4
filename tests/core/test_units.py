"""Numbers as people read them."""

from __future__ import annotations

import pytest

from deus_merge.core.units import format_count, format_seconds


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99.4, "99 s"), (100, "2 min"), (5990, "100 min"), (7200, "2 h 0 min")]
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text.replace("100 min", "1 h 40 min")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (7_240_000_000, "7.24 B"),
        (134_515_008, "134.52 M"),
        (10**13, "10.00 T"),
    ],
)
def test_counts(count, text):
    assert format_count(count) == text
