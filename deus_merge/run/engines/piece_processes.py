"""The engine that hands pieces out to processes of this machine, for outputs in buckets: while one uploads, another
computes."""

from __future__ import annotations

import pickle
import queue
import sys
import threading
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from subprocess import Popen

from ...checkpoint.storage import divide_spools
from ...checkpoint.system import keep_freed_memory
from ...core.errors import MachineError
from ...plan.pieces import Piece, pieces, share
from ...plan.types import Plan
from ..device import default_threads
from ..piece_job import OnBlock, PieceJob
from ..preflight import RunOptions
from .processes import device_of, start_process
from .worker import listen, sendable, sender

_DEATHS = 3  # of processes over the same piece


@dataclass
class _Worker:
    """One process, its socket, the piece that it makes now, and those that it will get."""

    process: Popen
    connection: Connection
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
        for worker in self._workers:
            worker.connection.close()  # ends it
            with suppress(OSError):
                worker.process.kill()
        for worker in self._workers:
            worker.process.wait()

    def make(self, mine: Sequence[Piece], on_block: OnBlock) -> dict[str, bool]:
        """Make pieces.

        Args:
            mine: The pieces.
            on_block: Called after each block, with whether it was finished already.

        Returns:
            By the name of a piece, whether it was made, and not finished already.

        Raises:
            DeusMergeError: as `PieceJob.make`.
            MachineError: processes that made a piece ended again and again.
        """
        made: dict[str, bool] = {}
        deaths: Counter[str | None] = Counter()
        for number in range(min(self._count, len(mine))):
            part = share(mine, number + 1, min(self._count, len(mine)))
            self._workers.append(self._start(number, deque(piece.name for piece in part)))
        by_name = {piece.name: piece for piece in mine}
        while len(made) < len(mine):
            numbers = {worker.connection: number for number, worker in enumerate(self._workers)}
            for connection in wait(list(numbers)):
                assert isinstance(connection, Connection)
                number = numbers[connection]
                worker = self._workers[number]
                try:
                    kind, *content = connection.recv()
                except (EOFError, OSError):
                    deaths[worker.piece] += 1
                    if deaths[worker.piece] >= _DEATHS:
                        raise self._death(worker, by_name) from None
                    self._replace(number)
                    continue
                if kind == "error":
                    raise content[0]
                if kind == "made":
                    name, fresh = content
                    made[name], worker.piece = fresh, None
                elif kind == "block":
                    index, resumed = content
                    on_block(self._plan.blocks[index], resumed)
                else:
                    self._hand_out(worker)
        return made

    def _hand_out(self, worker: _Worker) -> None:
        """Give a worker its next piece; the last one of the worker that has most left, where it has none of its own."""
        longest = max(self._workers, key=lambda worker: len(worker.share)).share
        if worker.share or longest:
            worker.piece = worker.share.popleft() if worker.share else longest.pop()
            with suppress(OSError):  # a dead worker: the next read of its socket tells
                worker.connection.send(worker.piece)

    def _replace(self, number: int) -> None:
        """Start a process in place of one that died; its piece comes first."""
        dead = self._workers[number]
        dead.connection.close()
        dead.process.wait()
        if dead.piece is not None:
            dead.share.appendleft(dead.piece)
        self._workers[number] = self._start(number, dead.share)

    def _start(self, number: int, part: deque[str]) -> _Worker:
        process, connection = start_process("piece_processes", self._threads)
        options = replace(self._options, device=device_of(self._device, number) or self._options.device)
        with suppress(OSError):
            connection.send_bytes(self._setup)
            connection.send(options)
        return _Worker(process, connection, part)

    def _death(self, worker: _Worker, by_name: dict[str, Piece]) -> MachineError:
        where = by_name[worker.piece].title if worker.piece else "--workers"
        got, hint = f"exit code {worker.process.wait()}", "--workers 1 shows the reason; or memory is short"
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
    try:
        keep_freed_memory()
        by_name = {piece.name: piece for piece in pieces(plan)}
        job = PieceJob(plan, out, options, mixed_machines=mixed_machines)
        while True:
            send("ready")
            name = names.get()
            send("made", name, job.make(by_name[name], lambda block, resumed: send("block", block.index, resumed)))
    except Exception as error:
        send("error", sendable(error))
