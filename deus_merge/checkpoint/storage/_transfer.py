"""Requests to a store through obstore: whole files and ranges of them, tried again, and checked to be what was asked.

obstore is imported when a store is opened: it is the extra ``remote``.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal, NoReturn

from ...core.errors import CheckpointError, MachineError
from ...core.urls import is_url, public_url
from ._answers import is_denied, is_missing, is_refused, is_without_bucket, is_without_credentials, reason

FIRST_CONTACT = 20.0  # seconds of patience with a store that has never answered: its name may be wrong
LONGEST_WAIT = 15.0  # seconds between two tries
STALLED = 30  # seconds without a byte after which a request is given up, and made again
_WHOLE_ANSWERS = 3  # whole files in place of ranges, after which the server is taken for one that has no ranges
#: beginnings of the names of environment variables, and of options of connections that follow them
_PREFIXES = ("AWS_", "GOOGLE_", "AZURE_")
_SWITCHES = frozenset({"allow_http", "allow_invalid_certificates"})
_SETTINGS = frozenset({"proxy_url", "proxy_ca_certificate", "proxy_excludes", "root_certificate"})


class Absent(CheckpointError):
    """There is no such file, or nobody may know of it."""


class Changed(CheckpointError):
    """The file is not the one that was opened."""


@dataclass(frozen=True)
class Identity:
    """What tells a file from an earlier or later one of its name.

    Attributes:
        size: Its size in bytes.
        etag: Its ETag; None where the store gives none.
        modified: When it was modified, in nanoseconds; 0 where the store does not say.
    """

    size: int
    etag: str | None = None
    modified: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """What a request must say so that another file is refused. Weak ETags never match in If-Match (RFC 9110)."""
        if self.etag is not None:
            return {} if self.etag.startswith("W/") else {"if_match": self.etag}
        if not self.modified:
            return {}
        second = datetime.fromtimestamp(self.modified // 10**9).astimezone()
        return {"if_unmodified_since": second}


@dataclass
class Remote:
    """A folder of files in a store. Pickles: it then connects again.

    Attributes:
        url: Its address, which may hold a signature in its query.
        name: Its address for messages and records, without secrets.
        kind: What opens it: obstore's store for ``http`` addresses, or what fits the address.
        headers: Sent with every request.
        revision: The commit that the address names, so that its files never change; None elsewhere.
        patience: Seconds for which a request is tried again.
        credentials: A hint on where credentials come from.
    """

    url: str
    name: str
    kind: Literal["http", "bucket"]
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    revision: str | None = None
    patience: float = 300.0
    credentials: str = ""

    _no_right = "no right to read it"

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: Any = None
        self._reached = False
        self.changed: str | None = None  # a file that was found to have changed
        self.requests = 0

    def __reduce__(self) -> tuple:
        return type(self), tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def __repr__(self) -> str:
        return f"Remote({self.name})"

    @property
    def reached(self) -> bool:
        """Whether the store has answered."""
        return self._reached

    def list(self) -> dict[str, int]:
        """The names and sizes of the files in the folder (not in folders in it), as a bucket lists them.

        Raises:
            CheckpointError: no such bucket, or no right to list it.
        """
        import obstore

        found = self._tried("", lambda store: obstore.list_with_delimiter(store))
        return {meta["path"].rpartition("/")[2]: meta["size"] for meta in found["objects"] if meta["path"]}

    def whole(self, name: str, most: int) -> bytes:
        """A small file.

        Args:
            name: Its name.
            most: The most bytes that it may have.

        Raises:
            Absent: there is none.
            CheckpointError: it cannot be read, or is larger.
        """
        import obstore

        def get(store: Any) -> bytes:
            result = obstore.get(store, name)
            size = result.meta["size"]
            if size > most:
                where = f"{self.name}/{name}"
                raise CheckpointError("the file is too large", where=where, expected=f"at most {most} bytes", got=size)
            data = bytes(result.bytes())
            if len(data) != size:
                raise _Truncated(f"{len(data)} of {size} bytes")
            return data

        return self._tried(name, get)

    def begin(self, name: str, count: int) -> tuple[bytes, Identity]:
        """The first ``count`` bytes of a file, or all of it if it has fewer, and its identity.

        Raises:
            Absent: there is none.
            CheckpointError: it cannot be read; or the store tells no ETag and no time of modification.
        """
        data, identity = self._range(name, 0, count, None)
        if self.revision is None and identity.etag is None and not identity.modified:
            raise CheckpointError(
                "the server tells neither an ETag nor a time of modification, so a change would not be noticed",
                where=f"{self.name}/{name}",
                hint="download the model and name the folder",
            )
        return data, identity

    def range(self, name: str, begin: int, end: int, identity: Identity) -> memoryview:
        """Bytes ``begin`` to ``end`` of a file.

        Raises:
            Changed: it is not the file of this identity any more.
            CheckpointError: it cannot be read.
            MachineError: the store has not answered for `patience` seconds.
        """
        return self._range(name, begin, end, identity)[0]

    def _range(self, name: str, begin: int, end: int, known: Identity | None) -> tuple[Any, Identity]:
        import obstore

        options: Any = {"range": (begin, end)}
        if known is not None and self.revision is None:
            options |= known.options
        whole: Any = {key: value for key, value in options.items() if key != "range"}
        whole_answers = 0

        def get(store: Any) -> tuple[Any, Identity]:
            nonlocal whole_answers
            try:
                result = obstore.get(store, name, options=options)
            except obstore.exceptions.NotSupportedError:
                # A whole file in place of a range, which obstore refuses.
                whole_answers += 1
                if whole_answers < _WHOLE_ANSWERS:
                    raise
                result = obstore.get(store, name, options=whole)
                if begin or result.meta["size"] > end:
                    self._refuse_whole(name)
            found = _identity(result.meta)
            self._check_same(name, known, found)
            data = memoryview(result.bytes())
            wanted = min(end, found.size) - begin
            if tuple(result.range) != (begin, begin + wanted) or len(data) != wanted:
                raise _Truncated(f"{len(data)} of {wanted} bytes")
            return data, found

        return self._tried(name, get, known is not None)

    def _refuse_whole(self, name: str) -> NoReturn:
        raise CheckpointError(
            "the server sends whole files where a range was asked for",
            where=f"{self.name}/{name}",
            expected="206 Partial Content",
            got="200 OK",
            hint="download the model and name the folder, or serve it with nginx, Apache, or a bucket",
        )

    def _check_same(self, name: str, known: Identity | None, found: Identity) -> None:
        if known is None:
            return
        same = found.size == known.size
        if self.revision is None:
            same = same and (found.etag == known.etag if known.etag else found.modified == known.modified)
        if not same:
            self._refuse_changed(name)

    def _refuse_changed(self, name: str) -> NoReturn:
        self.changed = name
        raise Changed("the file has changed since it was opened", where=f"{self.name}/{name}")

    def _store(self) -> Any:
        with self._lock:
            if self._opened is None:
                # Patience is ours: obstore's own retries are few, so that a connection that came back is soon used.
                self._opened = self._connected({"max_retries": 1, "retry_timeout": timedelta(seconds=10)})
            return self._opened

    def _connected(self, retry: Any) -> Any:
        """obstore's store.

        Args:
            retry: How often it makes a request again by itself.
        """
        from obstore.exceptions import BaseError
        from obstore.store import HTTPStore, from_url

        client: dict[str, Any] = {"connect_timeout": "10s", "read_timeout": f"{STALLED}s", "timeout": "1h"}
        if self.kind == "http":
            client |= {"allow_http": True, "default_headers": dict(self.headers)}
        else:
            client |= _client_options()
        open_: Any = HTTPStore if self.kind == "http" else from_url
        try:
            return open_(self.url, client_options=client, retry_config=retry)
        except (BaseError, ValueError) as error:
            got, hint = reason(error), self.credentials or None
            raise CheckpointError("the address cannot be opened", where=self.name, got=got, hint=hint) from None

    def _tried(self, name: str, get: Callable[[Any], Any], known: bool = False) -> Any:
        """The result of a request, which is made again while that may help."""
        from obstore.exceptions import BaseError

        store, began, wait = self._store(), time.monotonic(), 0.25
        while True:
            try:
                self.requests += 1
                result = get(store)
                self._reached = True
                return result
            except (BaseError, OSError, ValueError, _Truncated) as error:
                failure = error
            self._judge(name, failure, known)
            limit = self.patience if self._reached else min(FIRST_CONTACT, self.patience)
            elapsed = time.monotonic() - began
            if elapsed + wait > limit:
                self._give_up(name, failure, elapsed)
            _wait_or_end(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def _judge(self, name: str, error: Exception, known: bool) -> None:
        """Raise what trying again cannot change."""
        from obstore import exceptions

        where = f"{self.name}/{name}" if name else self.name
        if isinstance(error, exceptions.PreconditionError | exceptions.NotModifiedError):
            self._refuse_changed(name)
        hint = self.credentials or None
        if is_missing(error):
            self._reached = True
            if known:
                self._refuse_changed(name)
            bucket = "no such container" if self.url.startswith("az:") else "no such bucket"
            what = bucket if is_without_bucket(error) else "no such file" if name else "no such folder"
            raise Absent(what, where=where, hint="check the address")
        # once the store has answered there are credentials: what fails then is a request for new ones
        if not self._reached and is_without_credentials(error):
            raise CheckpointError("no valid credentials were found", where=where, got=reason(error), hint=hint)
        if is_denied(error):
            raise Absent(self._no_right, where=where, got=reason(error), hint=hint)
        if "builder error" in str(error):
            raise CheckpointError("the address cannot be opened", where=where, hint=hint)
        if "Content-Length" in str(error):
            hint = "it may compress files as it sends them: download the model and name the folder"
            raise CheckpointError("the server does not tell how long the file is", where=where, hint=hint)
        if is_refused(error):
            raise CheckpointError("the server refuses the request", where=where, got=reason(error))

    def _give_up(self, name: str, error: Exception, seconds: float) -> NoReturn:
        where, got = f"{self.name}/{name}" if name else self.name, reason(error)
        if not self._reached:
            hint = "check the address and the connection"
            raise CheckpointError("the server cannot be reached", where=where, got=got, hint=hint) from None
        got = f"{got}, and no answer for {seconds:.0f} s of trying"
        raise MachineError("the connection is lost", where=where, got=got) from None


def _wait_or_end(seconds: float) -> None:
    """Wait, but end with an error once the program is ending: it waits for its threads, and nobody needs the result."""
    until = time.monotonic() + seconds
    while True:
        if not threading.main_thread().is_alive():
            raise MachineError("the program is ending")
        left = until - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, 0.2))


class _Truncated(Exception):
    """An answer that lacks bytes."""


def _identity(meta: Mapping[str, Any]) -> Identity:
    return Identity(meta["size"], meta["e_tag"], round(meta["last_modified"].timestamp()) * 10**9)


def _client_options() -> dict[str, Any]:
    """The settings of connections in the environment, which obstore reads only where it is given none."""
    found: dict[str, Any] = {}
    for name, value in os.environ.items():
        _, _, option = name.lower().partition("_")
        if name.startswith(_PREFIXES) and option in _SWITCHES:
            found[option] = value.lower() in ("1", "true", "yes", "on")
        elif name.startswith(_PREFIXES) and option in _SETTINGS:
            found[option] = value
    return found


def check_installed(ref: str) -> None:
    """Check that the extra is there.

    Raises:
        CheckpointError: it is not.
    """
    import importlib.util

    if importlib.util.find_spec("obstore") is None:
        where = public_url(ref) if is_url(ref) else ref
        hint = 'pip install "deus-merge[remote]"'
        raise CheckpointError("buckets and servers need obstore, which is not installed", where=where, hint=hint)
