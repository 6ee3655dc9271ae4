"""An S3 server for tests: moto's, which runs in an environment of its own."""

from __future__ import annotations

import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MOTO = Path(os.environ.get("DEUS_MERGE_MOTO", Path(__file__).parents[2] / ".venv-moto")) / "bin/python"
SECRET = "a-secret-access-key-of-nobody"
#: the server ends when its standard input does: with the process that started it, however that one ends
SERVER = """
import os, sys, threading
threading.Thread(target=lambda: os._exit(len(sys.stdin.buffer.read())), daemon=True).start()
from moto.server import main
main(["-H", "127.0.0.1", "-p", "0"])
"""
_RUNNING = "DEUS_MERGE_S3_SERVER"  # the environment variable that processes have whose ancestor has started a server


class Moto:
    """A running server.

    Args:
        url: Its address.
        log: Its log: a line for each request.
    """

    def __init__(self, url: str, log: Path):
        self.url, self.log = url, log

    @contextmanager
    def used(self) -> Iterator[None]:
        """With the environment from which obstore takes its address and credentials."""
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                patch.delenv(name)
            for name, value in {
                "AWS_ENDPOINT_URL": self.url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": SECRET,
            }.items():  # fmt: skip
                patch.setenv(name, value)
            yield

    def make_bucket(self, name: str) -> None:
        self._ask(name, "PUT")

    def unfinished(self, bucket: str) -> list[str]:
        """The names of objects of which parts were uploaded, but never put together."""
        return re.findall("<Key>(.*?)</Key>", self._ask(f"{bucket}?uploads", "GET"))

    def remove_bucket(self, name: str) -> None:
        """Remove an empty bucket."""
        self._ask(name, "DELETE")

    def _ask(self, what: str, method: str) -> str:
        request = urllib.request.Request(f"{self.url}/{what}", method=method)
        return urllib.request.urlopen(request, timeout=10).read().decode()


@contextmanager
def running(folder: Path) -> Iterator[Moto]:
    """A server, with its log in a folder. There is one at a time: a process that this one starts cannot start another,
    nor can the server, which sees no module of this folder."""
    assert _RUNNING not in os.environ, f"a server is running already: {os.environ[_RUNNING]}"
    if not MOTO.exists():
        reason = f"no moto at {MOTO}: run `make buckets`"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    command = [MOTO, "-I", "-c", SERVER]
    with open(folder / "log", "wb") as log, pytest.MonkeyPatch.context() as patch:
        patch.setenv(_RUNNING, str(os.getpid()))
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
        try:
            yield Moto(_address(process, folder / "log"), folder / "log")
        finally:
            process.kill()
            process.communicate()


def _address(process, log: Path) -> str:
    """Where the server listens, from its log."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        for word in log.read_text().split():
            if word.startswith("http://127.0.0.1:"):
                return word
        time.sleep(0.05)
    return pytest.fail(f"moto did not start: {log.read_text()[-2000:]}")
