"""Every merge method, by the name that recipes use: a file of this folder each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from ..core.plugins import plugins
from .base import MergeMethod


def methods() -> Mapping[str, MergeMethod]:
    """Every merge method, by name."""
    return cast(Mapping[str, MergeMethod], plugins("deus_merge.methods", "METHOD"))
