"""The engine that hands blocks out to processes of this machine.

Each worker has a contiguous share, since neighbouring blocks read the same tensors; one that has finished its own takes
over half of what the slowest has left. All write into the same unfinished folder, each block its own bytes; only this
process keeps the journal. Each worker has a socket of its own: a queue that all share can be left locked by one that is
killed. A worker ends at once when this process does.
"""

from __future__ import annotations

import pickle
import signal
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

from ...core.errors import MachineError
from ...core.units import format_size
from ...plan.blocks import BlockPlan
from ...plan.types import block_seconds
from .base import Job, OnFinished
from .children import Child, device_of, end_children, ending, start_child

_DEATHS = 3  # of workers over the same block: then the block is to blame
_BATCHES = 8  # into how many parts a share is cut, at most


@dataclass
class _Worker(Child):
    """A worker: the blocks that it will get, those that it has, and the last one that it began."""

    share: deque[int]
    batch: list[int] = field(default_factory=list)
    begun: int | None = None


class Processes:
    """Makes blocks in processes of this machine.

    Args:
        workers: How many.
    """

    def __init__(self, workers: int):
        self.workers = workers

    def run(self, job: Job, on_finished: OnFinished) -> None:
        if job.blocks:
            with _Crew(job, min(self.workers, len(job.blocks))) as crew:
                crew.work(on_finished)


class _Crew:
    """The workers of a job. A context manager: they are gone when it is left."""

    def __init__(self, job: Job, count: int):
        self._job, self._count = job, count
        self._seconds = {i: block_seconds(job.plan.blocks[i]) for i in job.blocks}
        self._batch_seconds = sum(self._seconds.values()) / (count * _BATCHES)
        self._deaths: Counter[int | None] = Counter()
        self._workers: list[_Worker] = []
        self._setup = pickle.dumps(
            (
                job.plan,
                job.writer.folder,
                job.writer.layouts,
                job.seed,
                job.threads,
                _part(job.max_memory, count),
                count,
            )
        )

    def __enter__(self) -> _Crew:
        try:
            for number, share in enumerate(self._shares()):
                self._workers.append(self._start(number, share))
                self._tell("worker started", number, share, pid=self._workers[number].process.pid)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        end_children(self._workers)

    def work(self, on_finished: OnFinished) -> None:
        """Hand out blocks until all are finished."""
        left = set(self._job.blocks)
        while left:
            number_of = {worker.connection: number for number, worker in enumerate(self._workers)}
            for connection in wait(list(number_of)):
                assert isinstance(connection, Connection)
                number = number_of[connection]
                try:
                    kind, *content = connection.recv()
                except (EOFError, OSError):
                    self._replace(number)
                    continue
                self._deaths[None] = 0  # it could begin
                if kind == "error":
                    raise content[0]
                if kind == "finished":
                    index, record, received = content
                    self._job.writer.received |= received
                    block = self._job.plan.blocks[index]
                    self._workers[number].batch.remove(index)
                    left.discard(index)
                    self._job.writer.written_elsewhere(w.name for output in block.outputs for w in output.written)
                    on_finished(block, record)
                    self._job.ended(block, record, worker=number + 1)
                elif kind == "fraction":
                    self._written(number, *content)
                else:
                    self._hand_out(number)

    def _written(self, number: int, index: int, fraction: float) -> None:
        """A worker has written this fraction of a block."""
        block, worker = self._job.plan.blocks[index], self._workers[number]
        if worker.begun != index:
            worker.begun = index
            self._job.began(block, worker=number + 1)
        if self._job.on_fraction:
            self._job.on_fraction(block, fraction)

    def _tell(self, event: str, number: int, blocks: Iterable[int], **more: object) -> None:
        """Tell of something that happened to a worker."""
        titles = [self._job.plan.blocks[index].title for index in blocks]
        self._job.on_event({"event": event, "worker": number + 1, "blocks": titles, **more})

    def _shares(self) -> list[deque[int]]:
        """The blocks in contiguous shares of about equal work, none of them empty."""
        shares: list[deque[int]] = [deque() for _ in range(self._count)]
        total, before = sum(self._seconds.values()) or 1.0, 0.0
        for index in self._job.blocks:
            middle = before + self._seconds[index] / 2
            shares[min(self._count - 1, int(middle / total * self._count))].append(index)
            before += self._seconds[index]
        return shares

    def _hand_out(self, number: int) -> None:
        """Give a worker that waits its next blocks; nothing while there are none."""
        worker = self._workers[number]
        if not worker.share:
            self._steal(number)
        batch, seconds = [], 0.0
        while worker.share and (not batch or seconds < self._batch_seconds):
            batch.append(worker.share.popleft())
            seconds += self._seconds[batch[-1]]
        if batch:
            worker.batch += batch
            with suppress(OSError):  # a dead worker: the next read of its socket tells
                worker.connection.send(batch)

    def _steal(self, thief: int) -> None:
        """Take over the second half of the work that the slowest worker has not begun."""
        slow = max(range(len(self._workers)), key=lambda n: sum(self._seconds[i] for i in self._workers[n].share))
        slowest = self._workers[slow]
        half = sum(self._seconds[i] for i in slowest.share) / 2
        taken: deque[int] = deque()
        while slowest.share and (not taken or sum(self._seconds[i] for i in taken) < half):
            taken.appendleft(slowest.share.pop())
        self._workers[thief].share = taken
        if taken:
            self._tell("taken over", thief, taken, **{"from": slow + 1})

    def _replace(self, number: int) -> None:
        """Start a worker in place of one that died; its unfinished blocks come first."""
        dead = self._workers[number]
        code = dead.process.wait()
        self._tell("worker lost", number, dead.batch, how=ending(code))
        first = dead.batch[0] if dead.batch else None  # the block at which it died; None: before its first one
        self._deaths[first] += 1
        if self._deaths[first] >= _DEATHS:
            raise _death(None if first is None else self._job.plan.blocks[first], code)
        dead.connection.close()
        dead.share.extendleft(reversed(dead.batch))
        self._workers[number] = self._start(number, dead.share)
        self._tell("worker started", number, dead.share, pid=self._workers[number].process.pid)
        for other, worker in enumerate(self._workers):  # who waits in vain for work can have some of this
            if other != number and not worker.batch and not worker.share:
                self._hand_out(other)

    def _start(self, number: int, share: deque[int]) -> _Worker:
        process, connection = start_child("worker", self._job.threads)
        with suppress(OSError):
            connection.send_bytes(self._setup)
            connection.send(device_of(self._job.device, number))
        return _Worker(process, connection, share)


def _part(limit: int | None, count: int) -> int | None:
    return None if limit is None else limit // count


def _death(block: BlockPlan | None, code: int) -> MachineError:
    got = ending(code)
    hint = "--workers 1 shows the reason"
    if block is not None and -code == signal.SIGKILL:
        hint = f"memory may be short: the block was estimated at {format_size(block.workspace())}; use fewer --workers"
    if block is None:
        return MachineError("worker processes end before they can begin", where="--workers", got=got, hint=hint)
    return MachineError("the worker processes that made this block ended", where=block.title, got=got, hint=hint)
