"""A folder of a bucket that an output is written to: small objects, and files of any size in parts.

No object is ever seen half-written. A file that is given up while it is uploaded leaves nothing, but where the process
is killed the store keeps parts that nobody sees, until a rule of the bucket removes them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ...core.errors import MachineError
from ..header import MAX_JSON
from ..system import disk_errors
from ._answers import is_without_bucket, is_without_conditions
from ._transfer import LONGEST_WAIT, Absent, Identity, Remote, _identity, _wait_or_end

PART = 8 << 20  # bytes of one part of a file
_MOST_PARTS = 9000  # of a file: S3 takes 10 000
_CONCURRENT = 8  # parts at once
_CHECKED = 2.0  # seconds from one look at whether an upload is still wanted to the next
_DELETED = 500  # objects in one request
_PART_RETRIES = 1000  # the time decides


class GivenUp(Exception):
    """What was to be uploaded is not wanted any more."""


@dataclass
class Sink(Remote):
    """A folder of a bucket. Pickles: it then connects again."""

    _no_right = "no right to read or write it"

    def listed(self, folder: str = "") -> tuple[dict[str, Identity], list[str]]:
        """What lies directly in the folder, or in a folder in it.

        Args:
            folder: Like ``a/b``.

        Returns:
            The identity of each object, and the folders: names relative to the folder that is listed.

        Raises:
            CheckpointError: no such bucket, or no right to list it.
        """
        import obstore

        found = self._tried("", lambda store: obstore.list_with_delimiter(store, folder or None))
        # consoles of buckets show a folder by an empty object, whose path is the folder's
        objects = {m["path"].rpartition("/")[2]: _identity(m) for m in found["objects"] if m["path"] != folder}
        return objects, [path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"]]

    def read(self, name: str) -> bytes | None:
        """A small object; None where there is none.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            return self.whole(name, MAX_JSON)
        except Absent as error:
            if error.message == "no such file":
                return None
            raise

    def identity(self, name: str) -> Identity | None:
        """The identity of an object; None where there is none.

        Raises:
            CheckpointError: it cannot be read.
        """
        import obstore

        try:
            return self._tried(name, lambda store: _identity(obstore.head(store, name)))
        except Absent as error:
            if error.message == "no such file":
                return None
            raise

    def put(self, name: str, content: bytes, *, create: bool = False) -> bool:
        """Write a small object.

        Args:
            name: Its name, like ``1_Pooling/config.json``.
            content: Its bytes.
            create: Only where there is none, if the store has such requests: most have.

        Returns:
            Whether it has this content now; False where another one was there before.

        Raises:
            CheckpointError: no such bucket, or no right to write to it.
            MachineError: the store has not answered for `patience` seconds.
        """
        from obstore import exceptions, put

        def write(store: Any) -> bool:
            try:
                put(store, name, content, mode="create" if create else "overwrite", use_multipart=False)
            except exceptions.AlreadyExistsError:
                return False
            except exceptions.BaseError as error:
                if not create or not is_without_conditions(error):
                    raise
                if self.identity(name) is not None:
                    return False
                put(store, name, content, use_multipart=False)
            return True

        # The answer to a request that did write it may have been lost.
        return self._tried(name, write) or self.read(name) == content

    def upload(self, name: str, file: Path, check: Callable[[], None]) -> Identity:
        """Write a file of any size, in parts. An object of this name is replaced, in one step at the end.

        Args:
            name: Its name.
            file: The file.
            check: Called every few seconds meanwhile; raises what the upload is given up with.

        Returns:
            Its identity.

        Raises:
            CheckpointError: no such bucket, or no right to write to it.
            MachineError: the store has not answered for `patience` seconds, or the file cannot be read.
        """
        from obstore import put
        from obstore.exceptions import BaseError

        size, stopped = os.stat(file).st_size, threading.Event()
        part = max(PART, -(-size // _MOST_PARTS))
        # Parts are tried again by obstore, which alone knows them; the whole file after that.
        seconds = min(self.patience, 60.0)
        backoff = {"init_backoff": timedelta(seconds=0.25), "max_backoff": timedelta(seconds=10), "base": 2}
        retry = {"max_retries": _PART_RETRIES, "retry_timeout": timedelta(seconds=seconds), "backoff": backoff}
        store = self._connected(retry)

        def parts() -> Iterator[bytes]:
            sent = 0
            with disk_errors(file), open(file, "rb") as opened:
                while sent < size:
                    content = opened.read(part)
                    if not content:
                        raise MachineError("the file ends early", where=file, got=f"{sent} of {size} bytes")
                    sent += len(content)
                    yield content
                    if stopped.is_set() or not threading.main_thread().is_alive():
                        raise GivenUp

        def write() -> None:
            self.requests += 1
            put(store, name, parts(), chunk_size=part, max_concurrency=_CONCURRENT)

        failing_since, pause = 0.0, 0.25
        while True:
            began = time.monotonic()
            try:
                _watched(write, check, stopped)
                self._reached = True
                break
            except (BaseError, OSError, ValueError) as error:
                failure = error
            self._judge(name, failure, False)
            now = time.monotonic()
            failing_since = failing_since or max(began, now - seconds)
            if now - failing_since + pause > self.patience:
                self._give_up(name, failure, now - failing_since)
            _wait_or_end(pause)
            pause = min(2 * pause, LONGEST_WAIT)
        found = self.identity(name)
        if found is None or found.size != size:
            got = f"{found.size} bytes" if found else "none"
            raise MachineError("the store does not have what was written", where=f"{self.name}/{name}", got=got)
        return found

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; those that are not there are no error.

        Raises:
            CheckpointError: no right to do so.
        """
        import obstore

        def remove(store: Any, batch: list[str]) -> None:
            try:
                obstore.delete(store, batch)
            except FileNotFoundError as error:
                if is_without_bucket(error):
                    raise
                # Google and Azure say that one was not there, and leave others
                half = len(batch) // 2
                for part in (batch[:half], batch[half:]) if half else ():
                    remove(store, part)

        names = list(names)
        for at in range(0, len(names), _DELETED):
            batch = names[at : at + _DELETED]
            self._tried("", lambda store, batch=batch: remove(store, batch))


def _watched(function: Callable[[], None], check: Callable[[], None], stopped: threading.Event) -> None:
    """Call a function in a thread of its own, since it would not let an interrupt through, and ``check`` meanwhile: not
    in that thread, whose waiting would keep obstore from making the request."""
    future: Future = Future()

    def call() -> None:
        try:
            function()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name="upload", daemon=True).start()
    try:
        while not wait([future], _CHECKED).done:
            check()
    except BaseException:
        stopped.set()
        raise
    future.result()
