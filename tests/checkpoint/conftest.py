from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_files import random_tensors, write_model


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return random_tensors()


@pytest.fixture
def model(tmp_path, tensors) -> Path:
    return write_model(tmp_path / "source", tensors, shards=2)
