"""Processes that an engine starts on this machine: each has a socket of its own, and ends when its parent does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from deus_merge.run.engines.{} import main; main()"


@dataclass
class Child:
    """A process and the socket that leads to it."""

    process: subprocess.Popen
    connection: Connection


def start_child(module: str, threads: int) -> tuple[subprocess.Popen, Connection]:
    """A new process that runs ``main`` of a module of this folder, and the socket that leads to it: the last argument
    is its descriptor there."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _START.format(module), json.dumps(sys.path), str(theirs.fileno())],
            env=os.environ | {"OMP_NUM_THREADS": str(max(1, threads))},  # 0: nothing is computed
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt from the terminal is this process's business
        )
    return process, Connection(ours.detach())


def end_children(children: Sequence[Child]) -> None:
    """End processes, and wait until they are gone."""
    for child in children:
        child.connection.close()  # ends it
        with suppress(OSError):
            child.process.kill()
    for child in children:
        child.process.wait()


def device_of(name: str | None, number: int) -> str | None:
    """The device of a worker: with several GPUs, one after another."""
    if name != "cuda":
        return name
    import torch

    return f"cuda:{number % torch.cuda.device_count()}"


def ending(code: int) -> str:
    """How a process has ended, in words, by what `Popen.wait` gives."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
