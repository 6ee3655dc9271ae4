"""Addresses of models on other machines, and how they are shown: without passwords and signatures."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://", re.ASCII)
#: also as a `Path` writes them, which has joined the two slashes into one
_IN_TEXT = re.compile(r"\b(?:([A-Za-z][A-Za-z0-9+.-]*)://|(https?|s3a?|gs|az|hf):/(?=\w))([^\s'\"<>]*)", re.ASCII)


def is_url(text: str) -> bool:
    """Whether a reference is an address like ``s3://bucket/model``, not a path."""
    return _URL.match(text) is not None


def public_url(url: str) -> str:
    """An address without what may be a secret: ``user:password@``, query (which may hold a signature) and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def redacted(text: str) -> str:
    """A text in which every address is a `public_url`."""
    if ":/" not in text:
        return text
    return _IN_TEXT.sub(lambda match: _public(match[1] or match[2], match[3]), text)


def _public(scheme: str, rest: str) -> str:
    path = re.split(r"[?#]", rest, maxsplit=1)[0]
    host, slash, inner = path.partition("/")
    # A password with a slash in it is no valid address, but people write it.
    while "@" in inner and ":" in host and "@" not in host:
        host, slash, inner = inner.partition("@")[2].partition("/")[0], "/", inner.partition("@")[2].partition("/")[2]
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{inner}"


def url_path(url: str, *names: str) -> Path:
    """A file of an address as a `Path`: its name in messages and plans. There is no such file on this machine."""
    return Path(public_url(url).rstrip("/").replace("://", ":/", 1), *names)
