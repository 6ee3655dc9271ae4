"""Threads that make requests. Unlike those of a `ThreadPoolExecutor`, they let a program end that has an error."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

_IDLE = 0.5  # seconds without work after which a thread ends


class Threads:
    """Calls functions in a number of threads, in the order in which they are submitted.

    Args:
        count: The number of threads.
    """

    def __init__(self, count: int):
        self._count, self._running = count, 0
        self._calls: queue.SimpleQueue[tuple[Future, Callable, tuple]] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def submit(self, function: Callable[..., Any], *arguments: object) -> Future:
        """Call a function soon."""
        future: Future = Future()
        with self._lock:
            self._calls.put((future, function, arguments))
            if self._running < self._count:
                self._running += 1
                threading.Thread(target=self._work, name="requests").start()
        return future

    def _work(self) -> None:
        while True:
            try:
                future, function, arguments = self._calls.get(timeout=_IDLE)
            except queue.Empty:
                with self._lock:  # under which nothing is submitted
                    if self._calls.empty():
                        self._running -= 1
                        return
                continue
            if not threading.main_thread().is_alive():  # the program is ending: nobody needs the result
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
