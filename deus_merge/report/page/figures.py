"""Numbers as pages show them: one format for each kind of quantity, and none with an exponent like ``1e-05``.

Measured values have three significant digits, cosines three decimals, losses four, seconds two; counts are whole.
"""

from __future__ import annotations

import math
from typing import TypeGuard

from ...core.errors import printable
from ...core.units import format_count, format_seconds, format_size

MISSING = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: object) -> str:
    """A measured value in three significant digits: ``0.0123``, ``4.56``, ``12,300``, ``1.23 × 10⁻⁵``."""
    if not is_number(value):
        return MISSING
    if value == 0 or isinstance(value, int):
        return count(int(value))
    digits, _, exponent = f"{value:.2e}".partition("e")
    power = int(exponent)
    if power < -3 or power > 8:
        return f"{digits} × 10{str(power).translate(_SUPERSCRIPT)}"
    return f"{float(f'{value:.2e}'):,.{max(0, 2 - power)}f}"


def count(value: object) -> str:
    """A whole number, in groups of three digits: ``16,384``."""
    return f"{int(value):,}" if is_number(value) else MISSING


def cosine(value: object) -> str:
    """A cosine: ``0.123``."""
    return f"{round(value, 3) + 0.0:.3f}" if is_number(value) else MISSING


def loss(value: object) -> str:
    """A loss in nats a token: ``3.1416``."""
    return f"{value:.4f}" if is_number(value) else MISSING


def seconds(value: object) -> str:
    """A duration: ``0.12 s``, ``2 h 13 min``."""
    if not is_number(value):
        return MISSING
    return "< 0.01 s" if value < 0.01 else f"{value:.2f} s" if value < 100 else format_seconds(value)


def plain(text: object) -> str:
    """Text with its lines, but without other control characters."""
    return "\n".join(map(printable, str(text).splitlines()))


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a finite number, and a whole one not absurdly long."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 10**18
    return isinstance(value, float) and math.isfinite(value)


FILTERS = {
    "number": number, "count": count, "cosine": cosine, "loss": loss, "seconds": seconds, "plain": plain,
    "size": format_size, "large": format_count,
}  # fmt: skip
