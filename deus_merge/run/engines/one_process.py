"""The engine that uses no other process."""

from __future__ import annotations

from ...plan.blocks import BlockPlan
from ..block_runner import BlockRecord, run_blocks
from .base import Job, OnFinished


class OneProcess:
    """Makes all blocks in this process, in output order."""

    workers = 1

    def run(self, job: Job, on_finished: OnFinished) -> None:
        begun: set[int] = set()

        def written(block: BlockPlan, fraction: float) -> None:
            if block.index not in begun:
                begun.add(block.index)
                job.began(block)
            if job.on_fraction is not None:
                job.on_fraction(block, fraction)

        def finished(block: BlockPlan, record: BlockRecord) -> None:
            on_finished(block, record)
            job.ended(block, record)

        run_blocks(
            job.plan,
            job.blocks,
            job.writer,
            device=job.device,
            seed=job.seed,
            max_memory=job.max_memory,
            on_block=finished,
            on_fraction=written,
        )
