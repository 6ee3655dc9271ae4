"""The interface of an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ...checkpoint.shards import ShardWriter
from ...plan.blocks import BlockPlan
from ...plan.types import Plan
from ..block_runner import BlockRecord, OnFraction
from ..events import OnEvent, unheard

#: called when all tensors of a block are written, with what the manifest says of it
OnFinished = Callable[[BlockPlan, BlockRecord], None]


@dataclass(frozen=True)
class Job:
    """Blocks to make.

    Attributes:
        plan: The plan.
        blocks: Indices of the blocks, in output order.
        writer: The files of the plan, created at their full size.
        device: The name of the device; None when these blocks only copy.
        seed: For methods that draw random numbers.
        threads: CPU threads of each process.
        max_memory: Bytes that all processes may take together; None for no limit.
        on_fraction: Called with the fraction of a block that is written, from any thread.
        on_event: Called when a block begins and ends, and with what happens to workers.
    """

    plan: Plan
    blocks: Sequence[int]
    writer: ShardWriter
    device: str | None
    seed: int
    threads: int
    max_memory: int | None
    on_fraction: OnFraction | None = None
    on_event: OnEvent = unheard

    def began(self, block: BlockPlan, **more: object) -> None:
        """Tell that a block has begun."""
        self.on_event({"event": "block started", "block": block.title, "index": block.index, **more})

    def ended(self, block: BlockPlan, record: BlockRecord, **more: object) -> None:
        """Tell that a block is written."""
        facts = {"block": block.title, "index": block.index, "seconds": record["seconds"]}
        self.on_event({"event": "block done", **facts, **more})


class Engine(Protocol):
    """Makes blocks. Every block is the same call of `block_runner.run_blocks`, whoever makes it."""

    @property
    def workers(self) -> int:
        """How many processes compute at the same time."""
        ...

    def run(self, job: Job, on_finished: OnFinished) -> None:
        """Make all blocks of a job, in any order.

        Args:
            job: The blocks.
            on_finished: Called in this process, once for each block.

        Raises:
            DeusMergeError: as `block_runner.run_blocks`; the blocks that were reported are complete.
        """
        ...
