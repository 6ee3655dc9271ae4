"""Every storage, by name: a file of this folder each."""

from __future__ import annotations

from collections.abc import Mapping

from ...core.plugins import plugins
from .base import Storage


def storages() -> Mapping[str, Storage]:
    """Every storage by the name of its file."""
    return plugins(__package__ or "", "STORAGE")
