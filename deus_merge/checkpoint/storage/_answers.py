"""What the errors of obstore say, which has few kinds of them, and the answers of stores in their texts."""

from __future__ import annotations

import re

from ...core.urls import redacted

_STATUS = re.compile(r"(?:status code|\(code): (\d{3})[^:<{)]*")  # the second one is of an object in a list
_GENERIC = re.compile(r"^Generic \w+ error: ")
#: as S3 and Google say it, and Azure with and without lists
_NO_BUCKET = re.compile("NoSuchBucket|ContainerNotFound|FilesystemNotFound|container does not exist")
_PASSING = frozenset({408, 425, 429})  # answers of 4xx after which it is worth trying again
_PARTS_GONE = "InvalidBlockList"  # on Azure, once another upload of the file is finished: it is sent again
_NO_CREDENTIALS = re.compile(r"169\.254\.169\.254|metadata\.google|credential|Missing (account|key)", re.IGNORECASE)
_TOKEN_REQUEST = "token request"  # to another server than the store


def status_code(error: Exception) -> int:
    """The status of an answer of HTTP; 0 where there was none."""
    status = _STATUS.search(str(error))
    return int(status[1]) if status else 0


def is_missing(error: Exception) -> bool:
    """Whether the store has no such object, or no such bucket."""
    about_store = _TOKEN_REQUEST not in str(error)
    return about_store and (isinstance(error, FileNotFoundError) or status_code(error) in (404, 410))


def is_denied(error: Exception) -> bool:
    """Whether the store refuses these credentials."""
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    return isinstance(error, PermissionDeniedError | UnauthenticatedError) or status_code(error) in (401, 403)


def is_without_bucket(error: Exception) -> bool:
    """Whether the bucket is not there."""
    return _NO_BUCKET.search(str(error)) is not None


def is_without_credentials(error: Exception) -> bool:
    """Whether there are no credentials, or the server that gives tokens does not take them."""
    return _TOKEN_REQUEST in str(error) or (not is_denied(error) and bool(_NO_CREDENTIALS.search(str(error))))


def is_without_conditions(error: Exception) -> bool:
    """Whether a store cannot create an object only where there is none."""
    from obstore.exceptions import NotSupportedError

    return isinstance(error, NotSupportedError) or "NotImplemented" in str(error) or status_code(error) == 501


def is_refused(error: Exception) -> bool:
    """Whether an answer would be the same another time."""
    code = status_code(error)
    return 400 <= code < 500 and code not in _PASSING and _PARTS_GONE not in str(error)


def reason(error: Exception) -> str:
    """An error in a few words: the first line holds the address twice, the others are for the developers of obstore."""
    line = (str(error).splitlines() or [""])[0]
    status = _STATUS.search(line)
    text = f"HTTP {status[0].partition(': ')[2].strip()}" if status else _GENERIC.sub("", line.rpartition(" - ")[2])
    return redacted(text)[:200] or type(error).__name__
