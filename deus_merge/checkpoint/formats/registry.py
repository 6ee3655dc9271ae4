"""Every format of quantised weights, by name: a file of this folder each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from ...core.plugins import plugins
from .base import Format


def formats() -> Mapping[str, Format]:
    """Every format, by name."""
    return cast(Mapping[str, Format], plugins("deus_merge.checkpoint.formats", "FORMAT"))
