from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bucket_servers import Moto
from checkpoint_files import random_tensors, write_model


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return random_tensors()


@pytest.fixture
def model(tmp_path, tensors) -> Path:
    return write_model(tmp_path / "source", tensors, shards=2)


@pytest.fixture(scope="session")
def moto(tmp_path_factory) -> Iterator[Moto]:
    """An S3 server for all tests."""
    with Moto.running(tmp_path_factory.mktemp("moto")) as server:
        yield server
