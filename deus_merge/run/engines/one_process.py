"""The engine that uses no other process."""

from __future__ import annotations

from ..block_runner import run_blocks
from .base import Job, OnFinished


class OneProcess:
    """Makes all blocks in this process, in output order."""

    workers = 1

    def run(self, job: Job, on_finished: OnFinished) -> None:
        run_blocks(
            job.plan,
            job.blocks,
            job.writer,
            device=job.device,
            seed=job.seed,
            max_memory=job.max_memory,
            on_block=on_finished,
            on_fraction=job.on_fraction,
        )
