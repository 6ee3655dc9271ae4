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

MOTO = Path(os.environ.get("DEUS_MERGE_MOTO", Path(__file__).parents[2] / ".venv-moto")) / "bin/moto_server"
SECRET = "a-secret-access-key-of-nobody"


class Moto:
    """A running server.

    Args:
        url: Its address.
    """

    def __init__(self, url: str):
        self.url = url

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
    """A server, with its log in a folder."""
    if not MOTO.exists():
        reason = f"no moto at {MOTO}: run `make buckets`"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([MOTO, "-H", "127.0.0.1", "-p", "0"], stdout=log, stderr=log)
    try:
        yield Moto(_address(process, folder / "log"))
    finally:
        process.kill()
        process.wait()


def _address(process, log: Path) -> str:
    """Where the server listens, from its log."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        for word in log.read_text().split():
            if word.startswith("http://127.0.0.1:"):
                return word
        time.sleep(0.05)
    return pytest.fail(f"moto did not start: {log.read_text()[-2000:]}")
