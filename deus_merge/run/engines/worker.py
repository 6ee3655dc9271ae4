"""A worker process of `processes.Processes`."""

from __future__ import annotations

import os
import pickle
import queue
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ...checkpoint.shards import ShardWriter
from ...checkpoint.storage import divide_spools
from ...checkpoint.system import keep_freed_memory
from ...core.errors import DeusMergeError
from ...plan.blocks import BlockPlan
from ...plan.types import Plan
from ..block_runner import BlockRecord, run_blocks
from ..device import choose_device, set_threads
from ..limits import allow_open_files

_FRACTION_SECONDS = 0.5  # from one report about a block to the next, at least


def main() -> None:
    """Make the blocks that come through the socket whose descriptor is the last argument."""
    connection = Connection(int(sys.argv[-1]))
    plan, folder, layouts, seed, threads, max_memory, count = pickle.loads(connection.recv_bytes())
    divide_spools((model.checkpoint for model in plan.models), count)
    name = connection.recv()
    send = _sender(connection)
    batches: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, batches), daemon=True).start()
    try:
        keep_freed_memory()
        allow_open_files(len(layouts) + sum(len(m.checkpoint.files) for m in plan.models))
        device = choose_device(name) if name else None
        set_threads(threads if name else None)
        writer = ShardWriter(folder, layouts, resume=True)
        while True:
            send("ready")
            _make(plan, batches.get(), writer, send, device=device, seed=seed, max_memory=max_memory)
    except Exception as error:
        send("error", _sendable(error))


def _listen(connection: Connection, batches: queue.SimpleQueue[list[int]]) -> None:
    """Take batches as they come; end this process when the one at the other end is gone, even in mid-block: another
    run may soon write into the same files."""
    try:
        while True:
            batches.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)


def _sender(connection: Connection) -> Callable[..., None]:
    """A function that sends a message, from any thread."""
    lock = threading.Lock()

    def send(*message: Any) -> None:
        with lock:
            connection.send(message)

    return send


def _make(plan: Plan, batch: list[int], writer: ShardWriter, send: Callable[..., None], **options: Any) -> None:
    sent = 0.0

    def finished(block: BlockPlan, record: BlockRecord) -> None:
        names = [tensor.name for output in block.outputs for tensor in output.written]
        received = {name: writer.received[name] for name in names if name in writer.received}
        send("finished", block.index, record, received)

    def written(block: BlockPlan, fraction: float) -> None:
        nonlocal sent
        if not fraction or time.monotonic() - sent > _FRACTION_SECONDS:
            sent = time.monotonic()
            send("fraction", block.index, fraction)

    run_blocks(plan, batch, writer, on_block=finished, on_fraction=written, **options)


def _sendable(error: Exception) -> Exception:
    """An error that another process can raise: as it is, or with its traceback as its text."""
    if isinstance(error, DeusMergeError):
        return error
    import traceback

    return RuntimeError("in a worker process:\n" + "".join(traceback.format_exception(error)))
