"""Pages of HTML that need no other file: about an output (``report``), and about a comparison."""

from __future__ import annotations

from .frame import render
from .output import REPORT, render_page

__all__ = ["REPORT", "render", "render_page"]
