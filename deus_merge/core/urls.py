"""Addresses of models on other machines, and how they are shown: without passwords and signatures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.ASCII | re.DOTALL)
#: also as a `Path` writes them, which has joined the two slashes into one
_IN_TEXT = re.compile(
    r"\b(?:([A-Za-z][A-Za-z0-9+.-]*)://|(https?|s3a?|gs|az):/(?=[\w\[]))"
    r"((?:(?!\b[A-Za-z][A-Za-z0-9+.-]*://)[^\s'\"<>])*)",  # up to the next one, as in OLD=NEW
    re.ASCII,
)
#: one letter is a drive of Windows
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+([^/].*)", re.ASCII | re.DOTALL)
_CLOSING = ",;)]}"
#: what stands before a host; a password may also hold characters that should have been encoded
_USER = re.compile(r"([^/?#]*)@|([^/?#:@]+:(?!\d*(?:[/?#]|$))[^@]*)@")


class Url(NamedTuple):
    """The parts of an address.

    Attributes:
        scheme: ``https``, ``s3`` ...
        user: ``user:password``; empty where there is none.
        place: Host, or bucket, and path.
        query: What follows a question mark, perhaps a signature.
    """

    scheme: str
    user: str
    place: str
    query: str


def is_url(text: str) -> bool:
    """Whether a reference is an address like ``s3://bucket/model``, not a path."""
    return _URL.match(text) is not None


def split_url(url: str) -> Url:
    """The parts of an address; its fragment is left out.

    Raises:
        ValueError: not an address.
    """
    match = _URL.match(url)
    if match is None:
        raise ValueError("not an address")
    return _parts(match[1], match[2])


def public_url(url: str) -> str:
    """An address without what may be a secret: user, password, query and fragment."""
    parts = split_url(url)
    return f"{parts.scheme}://{parts.place}"


def redacted(text: str) -> str:
    """A text in which every address is a `public_url`."""
    if ":/" not in text:
        return text
    return _IN_TEXT.sub(lambda match: _public(match[1] or match[2], match[3]), text)


def _public(scheme: str, rest: str) -> str:
    url = rest.rstrip(_CLOSING)  # a list in YAML, a sentence in brackets
    return f"{scheme}://{_parts(scheme, url).place}{rest[len(url) :]}"


def url_path(url: str, *names: str) -> Path:
    """A file of an address as a `Path`: its name in messages and plans. There is no such file on this machine."""
    return Path(public_url(url).rstrip("/").replace("://", ":/", 1), *names)


def address_of(path: Path | str) -> str | None:
    """The address that a path was made from, as `url_path` or `Path` write one; None for a path of this machine."""
    match = _ADDRESS.fullmatch(str(path))
    return f"{match[1]}://{match[2]}" if match else None


def place_name(path: Path | str) -> str:
    """A path of this machine, or the address that it was made from, for messages."""
    address = address_of(path)
    return redacted(address) if address else str(path)


def _parts(scheme: str, rest: str) -> Url:
    user = _USER.match(rest)
    found = user[1] or user[2] or "" if user else ""
    place, _, query = (rest[user.end() :] if user else rest).partition("#")[0].partition("?")
    return Url(scheme, found, place, query)
