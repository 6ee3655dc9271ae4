"""What the making of a block takes its time for: seconds of all threads that make it, by kind of work."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ..report.manifest_parts import BlockSeconds

T = TypeVar("T")
READ, COMPUTED, WROTE, WAITED = "read", "computed", "wrote", "waited"
_thread = threading.local()  # `section`: the innermost section of this thread


class Stopwatch:
    """The times of one block.

    Within another section a thread is in the inner one alone: no moment of a thread counts twice. Threads work at the
    same time: the sum may be more than the block took.

    Args:
        on_processor: Whether the arithmetic runs on this machine's processor. Of computing then counts the time on it;
            the rest is waiting: for pages of mapped files, or for a processor that others use.
    """

    def __init__(self, on_processor: bool = False):
        self._on_processor = on_processor
        self._seconds: dict[str, float] = dict.fromkeys((READ, COMPUTED, WROTE, WAITED), 0.0)
        self._lock = threading.Lock()

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Count this thread's time until the end as ``kind``."""
        outer: _Section | None = getattr(_thread, "section", None)
        if outer is not None:
            outer.stop()
        inner = _thread.section = _Section(self, kind)
        try:
            yield
        finally:
            inner.stop()
            _thread.section = outer
            if outer is not None:
                outer.start()

    def each(self, kind: str, items: Iterable[T]) -> Iterator[T]:
        """The items, whose making counts as ``kind``; what is done with them does not."""
        iterator = iter(items)
        while True:
            with self.during(kind):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def add(self, kind: str, wall: float, processor: float) -> None:
        """Count seconds of a thread, of which it was so many on a processor."""
        with self._lock:
            if kind == COMPUTED and self._on_processor:
                self._seconds[WAITED] += max(0.0, wall - processor)
                wall = min(wall, processor)
            self._seconds[kind] += wall

    @property
    def seconds(self) -> BlockSeconds:
        """The times so far."""
        with self._lock:
            read, computed, wrote, waited = (round(value, 4) for value in self._seconds.values())
        return {"read": read, "computed": computed, "wrote": wrote, "waited": waited}


class _Section:
    """A part of a thread's time."""

    def __init__(self, watch: Stopwatch, kind: str):
        self.watch, self.kind = watch, kind
        self.start()

    def start(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.thread_time()

    def stop(self) -> None:
        self.watch.add(self.kind, time.perf_counter() - self._wall, time.thread_time() - self._processor)


@contextmanager
def during(kind: str) -> Iterator[None]:
    """Count this thread's time until the end as ``kind`` for the block that it makes; nothing where there is none."""
    section: _Section | None = getattr(_thread, "section", None)
    if section is None:
        yield
        return
    with section.watch.during(kind):
        yield
