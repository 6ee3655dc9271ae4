from __future__ import annotations

from pathlib import Path

import pytest
from grown import grow
from support import make_model


@pytest.fixture(scope="module")
def deeper(tmp_path_factory) -> Path:
    """4 layers and new ones at 2 and 4; tied embeddings."""
    folder = tmp_path_factory.mktemp("training")
    return grow(make_model(folder / "base", tied=True), folder / "deeper")
