"""Folders of a web server that can send ranges: nginx, Apache, a bucket's public address."""

from __future__ import annotations

import re
from base64 import b64encode
from html import unescape
from http.client import HTTPException
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from ...core.urls import split_url
from ..tensor_source import TensorSource
from ._remote import open_remote
from ._transfer import Remote, check_installed
from .base import LoadOptions

_LISTING = 4 << 20  # bytes of a page that lists a folder
_TIMEOUT = 20  # seconds
_LINK = re.compile(r"<a\s[^>]*?href\s*=\s*[\"']([^\"'#?]+)[\"']", re.IGNORECASE)


class Web:
    """The storage ``web``."""

    summary = "a folder of a web server, read by range"
    example = "https://host/model"

    def takes(self, ref: str, options: LoadOptions) -> bool:
        return ref.startswith(("https://", "http://"))

    def open(self, ref: str, options: LoadOptions) -> TensorSource:
        check_installed(ref)
        scheme, user, place, query = split_url(ref)
        name = f"{scheme}://{place.rstrip('/')}"
        url = f"{name}?{query}" if query else name
        headers = {"Authorization": f"Basic {b64encode(unquote(user).encode()).decode()}"} if user else {}
        hint = "check the credentials" if user or query else "https://user:password@host/..., or a signed address"
        remote = Remote(url, name, "http", headers, patience=options.patience, credentials=hint)
        return open_remote(remote, options.spool, _listed(remote))

    def sink(self, ref: str) -> None:
        return None


class _SameHost(HTTPRedirectHandler):
    """Follows no redirection to another host, which would get the password."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        same = urlsplit(newurl)[:2] == urlsplit(req.full_url)[:2]
        return super().redirect_request(req, fp, code, msg, headers, newurl) if same else None


def _listed(remote: Remote) -> list[str] | None:
    """The files of a folder, if the server sends a page with links to them; None if it does not."""
    parts = urlsplit(remote.url)
    request = Request(parts._replace(path=f"{parts.path}/").geturl(), headers=dict(remote.headers))
    try:
        # Not by obstore, which asks for the length of every answer.
        with build_opener(_SameHost).open(request, timeout=_TIMEOUT) as answer:
            page = answer.read(_LISTING).decode("utf-8", "replace")
    except (OSError, ValueError, HTTPException):
        return None
    names = {unquote(unescape(link)).removeprefix("./") for link in _LINK.findall(page)}
    files = sorted(name for name in names if name and "/" not in name)
    return files if "config.json" in files else None


STORAGE = Web()
