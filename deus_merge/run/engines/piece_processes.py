"""The engine that hands pieces out to processes of this machine, for outputs in buckets: while one uploads, another
computes."""

from __future__ import annotations

import pickle
import queue
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from ...checkpoint.storage import divide_spools
from ...checkpoint.system import keep_freed_memory
from ...core.errors import MachineError
from ...plan.blocks import BlockPlan
from ...plan.pieces import Piece, pieces, share
from ...plan.types import Plan
from ..device import default_threads
from ..events import OnEvent, unheard
from ..piece_job import OnBlock, PieceJob
from ..preflight import RunOptions
from .base import OnFraction
from .children import Child, device_of, end_children, ending, start_child
from .worker import fractions, listen, sendable, sender

_DEATHS = 3  # of processes over the same piece


@dataclass
class _Worker(Child):
    """A worker: the pieces that it will get, and the one that it makes now."""

    share: deque[str]
    piece: str | None = None


class PieceProcesses:
    """Makes pieces of an output in processes of this machine. A context manager: they are gone when it is left.

    Args:
        plan: The plan.
        out: The output's address as a path.
        options: As for `pieces.make_share`; all processes share ``max_memory``.
        device: The name of the device; None where nothing is computed.
        mixed_machines: As for `pieces.make_share`.
    """

    def __init__(self, plan: Plan, out: Path, options: RunOptions, device: str | None, *, mixed_machines: bool):
        count = options.workers
        assert isinstance(count, int)
        self._plan, self._count, self._device = plan, count, device
        self._threads: int = options.threads or default_threads(count) or 1
        limit = options.max_memory and options.max_memory // count
        self._options = replace(options, workers=1, threads=self._threads, max_memory=limit)
        self._setup = pickle.dumps((plan, out, mixed_machines, count))
        self._workers: list[_Worker] = []

    def __enter__(self) -> PieceProcesses:
        return self

    def __exit__(self, *exc: object) -> None:
        end_children(self._workers)

    def make(
        self,
        mine: Sequence[Piece],
        on_block: OnBlock,
        on_fraction: OnFraction | None = None,
        on_event: OnEvent = unheard,
    ) -> dict[str, bool]:
        """Make pieces.

        Args:
            mine: The pieces.
            on_block: Called once for each block, with whether it was finished already.
            on_fraction: As for `run_blocks`.
            on_event: Called with what happens to workers, and to the pieces and blocks of each.

        Returns:
            By the name of a piece, whether it was made, and not finished already.

        Raises:
            DeusMergeError: as `PieceJob.make`.
            MachineError: processes that made a piece ended again and again.
        """
        self._by_name, self._on_event = {piece.name: piece for piece in mine}, on_event
        made: dict[str, bool] = {}
        ended: set[int] = set()
        deaths: Counter[str | None] = Counter()
        for number in range(min(self._count, len(mine))):
            part = share(mine, number + 1, min(self._count, len(mine)))
            self._workers.append(self._start(number, deque(piece.name for piece in part)))
            self._tell_of_start(number)
        while len(made) < len(mine):
            numbers = {worker.connection: number for number, worker in enumerate(self._workers)}
            for connection in wait(list(numbers)):
                assert isinstance(connection, Connection)
                number = numbers[connection]
                worker = self._workers[number]
                try:
                    kind, *content = connection.recv()
                except (EOFError, OSError):
                    code = worker.process.wait()
                    self._tell("worker lost", number, [worker.piece] if worker.piece else [], how=ending(code))
                    deaths[worker.piece] += 1
                    if deaths[worker.piece] >= _DEATHS:
                        raise self._death(worker, code) from None
                    self._replace(number)
                    continue
                deaths[None] = 0  # it could begin
                if kind == "error":
                    raise content[0]
                if kind == "made":
                    name, fresh = content
                    made[name], worker.piece = fresh, None
                elif kind == "block":
                    index, resumed = content
                    if index not in ended:  # a lost worker may have made some blocks of its piece
                        ended.add(index)
                        on_block(self._plan.blocks[index], resumed)
                elif kind == "fraction":
                    index, fraction = content
                    if on_fraction is not None:
                        on_fraction(self._plan.blocks[index], fraction)
                elif kind == "event":
                    on_event({**content[0], "worker": number + 1})
                else:
                    self._hand_out(number)
        return made

    def _tell(self, event: str, number: int, names: Iterable[str], **more: object) -> None:
        """Tell of something that happened to a worker and its pieces."""
        blocks = [block.title for name in names for block in self._by_name[name].blocks]
        self._on_event({"event": event, "worker": number + 1, "blocks": blocks, **more})

    def _tell_of_start(self, number: int) -> None:
        worker = self._workers[number]
        self._tell("worker started", number, worker.share, pid=worker.process.pid)

    def _hand_out(self, number: int) -> None:
        """Give a worker its next piece; the last one of the worker that has most left, where it has none of its own."""
        worker = self._workers[number]
        slow = max(range(len(self._workers)), key=lambda n: len(self._workers[n].share))
        if not worker.share and self._workers[slow].share:
            worker.share.append(self._workers[slow].share.pop())
            self._tell("taken over", number, worker.share, **{"from": slow + 1})
        if worker.share:
            worker.piece = worker.share.popleft()
            with suppress(OSError):  # a dead worker: the next read of its socket tells
                worker.connection.send(worker.piece)

    def _replace(self, number: int) -> None:
        """Start a process in place of one that died; its piece comes first."""
        dead = self._workers[number]
        dead.connection.close()
        if dead.piece is not None:
            dead.share.appendleft(dead.piece)
        self._workers[number] = self._start(number, dead.share)
        self._tell_of_start(number)

    def _start(self, number: int, part: deque[str]) -> _Worker:
        process, connection = start_child("piece_processes", self._threads)
        options = replace(self._options, device=device_of(self._device, number) or self._options.device)
        with suppress(OSError):
            connection.send_bytes(self._setup)
            connection.send(options)
        return _Worker(process, connection, part)

    def _death(self, worker: _Worker, code: int) -> MachineError:
        got, hint = ending(code), "--workers 1 shows the reason; or memory is short"
        if worker.piece is None:
            return MachineError("worker processes end before they can begin", where="--workers", got=got, hint=hint)
        where = self._by_name[worker.piece].title
        return MachineError("the worker processes that made this piece ended", where=where, got=got, hint=hint)


def main() -> None:
    """Make the pieces that come through the socket whose descriptor is the last argument."""
    connection = Connection(int(sys.argv[-1]))
    plan, out, mixed_machines, count = pickle.loads(connection.recv_bytes())
    options = connection.recv()
    divide_spools((model.checkpoint for model in plan.models), count)
    send = sender(connection)
    names: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(connection, names), daemon=True).start()

    def finished(block: BlockPlan, resumed: bool) -> None:
        send("block", block.index, resumed)

    try:
        keep_freed_memory()
        by_name = {piece.name: piece for piece in pieces(plan)}
        job = PieceJob(plan, out, options, mixed_machines=mixed_machines)
        while True:
            send("ready")
            name = names.get()
            send("made", name, job.make(by_name[name], finished, fractions(send), lambda event: send("event", event)))
    except Exception as error:
        send("error", sendable(error))
