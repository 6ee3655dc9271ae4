"""Progress of a long call: how much is done, and how much there is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """A step of a long call that has just ended.

    Attributes:
        done: How many steps have ended.
        total: How many there are; of a comparison, about how many.
        title: The step in a few words.
        resumed: Whether an earlier run had finished it.
        seconds: Wall time since the call began.
    """

    done: int
    total: int
    title: str
    resumed: bool
    seconds: float

    def __str__(self) -> str:
        earlier = ", finished by the earlier run" if self.resumed else ""
        return f"[{self.done}/{self.total}] {self.title}{earlier} ({self.seconds:.1f} s)"


OnProgress = Callable[[Progress], None]


class Counter:
    """Counts the steps of a call.

    Args:
        report: Called after each step; None for nobody.
        total: How many there are, where that is known before the call.
    """

    def __init__(self, report: OnProgress | None, total: int = 0):
        self.report, self.total, self.done, self.began = report, total, 0, time.monotonic()

    def step(self, title: str, resumed: bool = False, total: int | None = None) -> None:
        """One more step has ended."""
        self.done += 1
        self.total = self.total if total is None else total
        if self.report is not None:
            self.report(Progress(self.done, self.total, title, resumed, time.monotonic() - self.began))
