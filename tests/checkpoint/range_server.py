"""A web server with ranges, ETags, a list of each folder, the hub's calls, and faults on request."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c" * 40


@dataclass
class Asked:
    """A request that came in."""

    path: str
    begin: int | None = None
    end: int | None = None
    headers: dict = field(default_factory=dict)

    @property
    def of_weights(self) -> bool:
        return self.path.endswith(".safetensors")

    @property
    def of_tensors(self) -> bool:
        """Whether it is for more than a header: those are asked for by the first 128 KiB."""
        return self.of_weights and self.end != 128 << 10


#: what a fault may be: 503 ..., "truncated", "whole", "reset", "slow", "shifted"
Fault = int | str | None


class RangeServer:
    """Serves a folder.

    Args:
        root: The folder.

    Attributes:
        fault: Called for each request; what it returns goes wrong.
        lists: Whether folders are listed.
        tags: ETags of files by name, in place of those of their content; None: no ETag is sent.
        user: ``user:password`` that is demanded.
        signature: The query parameter ``sig`` that is demanded.
        requests: Every request.
    """

    def __init__(self, root: Path):
        self.root, self.lists, self.user, self.signature = root, True, None, None
        self.fault: Callable[[Asked], Fault] = lambda asked: None
        self.tags: dict[str, str | None] = {}
        self.requests: list[Asked] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.owner = self
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def ranges(self) -> list[Asked]:
        """Requests for parts of weights."""
        return [asked for asked in self.requests if asked.of_weights]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def serving(root: Path):
    server = RangeServer(root)
    try:
        yield server
    finally:
        server.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        owner: RangeServer = self.server.owner
        parts = urlsplit(self.path)
        asked = Asked(unquote(parts.path), headers={key.lower(): value for key, value in self.headers.items()})
        if wanted := asked.headers.get("range"):
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            asked.begin, asked.end = int(begin), int(end) + 1
        owner.requests.append(asked)
        if (
            owner.user
            and asked.headers.get("authorization") != f"Basic {base64.b64encode(owner.user.encode()).decode()}"
        ):
            return self._answer(401)
        if owner.signature and parse_qs(parts.query).get("sig") != [owner.signature]:
            return self._answer(403)
        fault = owner.fault(asked)
        if fault == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        if isinstance(fault, int):
            return self._answer(fault)
        if fault == "slow":
            time.sleep(0.05)
        return self._file(owner, asked, fault)

    def _file(self, owner: RangeServer, asked: Asked, fault: Fault) -> None:
        path = asked.path.strip("/")
        if path.startswith("api/models/"):
            return self._model_info(owner, path.removeprefix("api/models/").partition("/revision/")[0])
        file = owner.root / path.replace(f"/resolve/{COMMIT}/", "/")
        if file.is_dir():
            names = "".join(f'<a href="{p.name}{"/" * p.is_dir()}">{p.name}</a>\n' for p in sorted(file.iterdir()))
            return self._answer(200, names.encode()) if owner.lists else self._answer(403)
        if not file.is_file():
            return self._answer(404)
        data = file.read_bytes()
        tag = owner.tags.get(file.name, f'"{hashlib.sha1(data).hexdigest()}"')
        if (match := asked.headers.get("if-match")) and match != tag:
            return self._answer(412)
        headers = {"Last-Modified": self.date_time_string(int(file.stat().st_mtime))}
        headers |= {"ETag": tag} if tag else {}
        if asked.begin is None or fault == "whole":
            return self._answer(200, data, headers, fault)
        begin, end = asked.begin, min(asked.end, len(data))
        said = begin + (fault == "shifted")
        headers["Content-Range"] = f"bytes {said}-{end - 1}/{len(data)}"
        return self._answer(206, data[begin:end], headers, fault)

    def _model_info(self, owner: RangeServer, repository: str) -> None:
        folder = owner.root / repository
        if not folder.is_dir():
            return self._answer(404, headers={"X-Error-Code": "RepoNotFound"})
        info = {"_id": "0", "id": repository, "modelId": repository, "sha": COMMIT, "private": False, "tags": []}
        info |= {"downloads": 0, "likes": 0, "siblings": [{"rfilename": p.name} for p in sorted(folder.iterdir())]}
        return self._answer(200, json.dumps(info).encode())

    def _answer(self, status: int, data: bytes = b"", headers: dict | None = None, fault: Fault = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if fault == "truncated":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass
