"""Engines, one file each: who makes the blocks of a plan. They only hand out numbers; the bytes are the same."""

from .base import Engine, Job
from .finished_pieces import FinishedPieces
from .one_process import OneProcess
from .processes import Processes

__all__ = ["Engine", "FinishedPieces", "Job", "OneProcess", "Processes"]
