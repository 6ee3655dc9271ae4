"""Engines, one file each: who makes the blocks of a plan. They only hand out numbers; the bytes are the same."""

from .base import Engine, Job, OnFraction
from .finished_pieces import FinishedPieces
from .one_process import OneProcess
from .processes import Processes


def engine_of(workers: int) -> Engine:
    """The engine for a number of processes."""
    return OneProcess() if workers == 1 else Processes(workers)


__all__ = ["Engine", "FinishedPieces", "Job", "OnFraction", "OneProcess", "Processes", "engine_of"]
