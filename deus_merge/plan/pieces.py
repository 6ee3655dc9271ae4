"""Pieces of a plan: whole output files with the blocks that fill them, which any worker can make.

Files are cut where blocks end (`checkpoint.layout.plan_shards`), so a piece is one file, or the files of one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoint.layout import ShardLayout
from ..core.errors import PlanError
from .blocks import BlockPlan
from .timing import block_seconds
from .types import Plan

_START_SECONDS = 0.01  # of every piece: its files are created


@dataclass(frozen=True)
class Piece:
    """A part of the output that shares no file with the rest. Pickles.

    Attributes:
        name: ``00003-of-00190``, in output order.
        blocks: Its blocks, in output order.
        shards: Its files.
    """

    name: str
    blocks: tuple[BlockPlan, ...]
    shards: tuple[ShardLayout, ...]

    @property
    def title(self) -> str:
        """What it holds, for messages: ``00003-of-00190 (layer 4 to layer 7)``."""
        first, last = self.blocks[0].title, self.blocks[-1].title
        return f"{self.name} ({first if first == last else f'{first} to {last}'})"

    @property
    def nbytes(self) -> int:
        """Total size of its files in bytes."""
        return sum(shard.size for shard in self.shards)

    @property
    def seconds(self) -> float:
        """A rough estimate of the time on a CPU."""
        return _START_SECONDS + sum(map(block_seconds, self.blocks))


def pieces(plan: Plan) -> tuple[Piece, ...]:
    """The pieces of a plan, in output order: a pure function, so every machine finds the same ones.

    Args:
        plan: The plan.

    Returns:
        Pieces that together have every block and every file once.
    """
    shard_of = {name: i for i, shard in enumerate(plan.shards) for name in shard.tensors}
    files = [{shard_of[w.name] for o in block.outputs for w in o.written} for block in plan.blocks]
    group = list(range(len(plan.shards)))  # file -> the first file that it is joined with

    def first(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    for used in files:
        joined = min(map(first, used), default=0)
        for i in list(used):
            group[first(i)] = joined
    parts: dict[int, tuple[list[BlockPlan], list[ShardLayout]]] = {}
    for i, shard in enumerate(plan.shards):
        parts.setdefault(first(i), ([], []))[1].append(shard)
    for block, used in zip(plan.blocks, files, strict=True):
        parts[first(min(used, default=0))][0].append(block)
    ordered = [parts[i] for i in sorted(parts)]
    total = len(ordered)
    return tuple(
        Piece(f"{i:05d}-of-{total:05d}", tuple(blocks), tuple(shards)) for i, (blocks, shards) in enumerate(ordered, 1)
    )


def share(found: Sequence[Piece], number: int, total: int) -> tuple[Piece, ...]:
    """One of ``total`` shares of pieces: neighbours, since neighbours read the same sources, and about equal work.

    Args:
        found: All pieces.
        number: Which share, from 1.
        total: How many shares there are; those beyond the number of pieces are empty.

    Raises:
        PlanError: there is no such share.
    """
    if not 1 <= number <= total:
        raise PlanError("no such share", where="--shard-of", expected=f"1/{total} to {total}/{total}", got=number)
    work = sum(piece.seconds for piece in found)
    chosen, before = [], 0.0
    for piece in found:
        middle = before + piece.seconds / 2
        if (number - 1) * work <= middle * total < number * work:
            chosen.append(piece)
        before += piece.seconds
    return tuple(chosen)
