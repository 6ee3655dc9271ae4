"""``inspect --similarity``: a table that fits 80 columns, and what to conclude from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from .output import echo_wrapped, table

_WIDTH = 49  # characters of a row for the columns of roles, with the means and the bar before and behind them
_BAR = 7  # characters of the longest bar
_NOTHING, _CLEAR = 0.02, 0.1  # how far above chance a cosine is small, and how far it is not


def show_similarity(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the output of `adjacent_similarity`: per pair the mean over all roles and each role's own value.

    Args:
        rows: One for each pair of neighbouring layers.
    """
    from ..report.inspection import similarity_roles

    means = [{key: _mean(row, key) for key in ("plain", "aligned", "chance")} for row in rows]
    top = max((mean["aligned"] for mean in means), default=0.0) or 1.0
    names = [f"{row['layers'][0]}-{row['layers'][1]}" for row in rows]
    groups = _groups(similarity_roles(rows))
    click.echo("cosine of rows of neighbouring layers: before alignment, after it, and")
    click.echo("after it by matrix; chance: random matrices of the same shapes, aligned")
    click.echo()
    for number, roles in enumerate(groups):
        if number:
            click.echo()
        body = [
            [
                name,
                *([cosine(mean["plain"]), cosine(mean["aligned"])] if not number else []),
                *(cosine(row["roles"][role]["aligned"]) if role in row["roles"] else "-" for role in roles),
                *(["█" * max(0, round(_BAR * mean["aligned"] / top))] if not number else []),
            ]
            for name, row, mean in zip(names, rows, means, strict=True)
        ]
        found = [{r: row["roles"][r]["chance"] for r in roles if r in row["roles"]} for row in rows]
        by_role = {role: next(chances[role] for chances in found if role in chances) for role in roles}
        first = ["", cosine(_average(means, "chance"))] if not number else []
        body.append(["chance", *first, *(cosine(by_role[role]) for role in roles), *([""] if not number else [])])
        columns = ["layers", *(["before", "after"] if not number else []), *roles, *([""] if not number else [])]
        table("", columns, body, right=tuple(range(1, 1 + len(first) + len(roles))))
    click.echo()
    echo_wrapped(_conclusion(names, means))


def _conclusion(names: Sequence[str], means: Sequence[Mapping[str, float]]) -> str:
    """What the values say about new layers between the neighbours."""
    if not means:
        return "one layer has no neighbours to compare"
    after, chance = _average(means, "aligned"), _average(means, "chance")
    values = f"({cosine(after)} and {cosine(chance)})"
    if after < chance + _CLEAR:
        alike = "hardly more alike than" if after > chance + _NOTHING else "as alike as"
        found = f"Aligned neighbours are {alike} random matrices {values}: the mean of two layers is close to neither."
    else:
        found = f"Aligned neighbours are more alike than random matrices {values}: a fused layer keeps what both have."
    order = sorted(range(len(means)), key=lambda i: means[i]["aligned"])
    if order[1:]:
        found += f" Most alike are layers {names[order[-1]]}, least {names[order[0]]}."
    return f"{found} Which new layers learn fastest this does not say: deus-merge compare measures it."


def _groups(roles: Sequence[str]) -> list[list[str]]:
    """Roles whose columns fit into a row, in as many groups as it takes; one group where there is none."""
    groups, used = [[]], 0
    for role in roles:
        width = max(len(role), 5) + 2
        if groups[-1] and used + width > _WIDTH:
            groups, used = [*groups, []], 0
        groups[-1].append(role)
        used += width
    return groups


def _mean(row: Mapping[str, Any], key: str) -> float:
    values = [found[key] for found in row["roles"].values()]
    return sum(values) / max(1, len(values))


def _average(means: Sequence[Mapping[str, float]], key: str) -> float:
    return sum(mean[key] for mean in means) / max(1, len(means))


def cosine(value: float) -> str:
    """``+0.23``; without a negative zero."""
    return f"{round(value, 2) + 0.0:+.2f}"
