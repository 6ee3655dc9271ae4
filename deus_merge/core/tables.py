"""Tables of HTML for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of HTML; every cell is text, which is escaped."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return f"<div><table>{line('th', columns)}{''.join(line('td', row) for row in rows)}</table></div>"


def html_titled(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A line of text above a table of HTML."""
    return f"<p>{html.escape(title)}</p>{html_table(columns, rows)}"
