from __future__ import annotations

from pathlib import Path

import pytest
from support import make_speakers


@pytest.fixture(scope="session")
def speakers(tmp_path_factory) -> dict[str, Path]:
    """Models with tokenizers of their own: see `support.make_speakers`."""
    return make_speakers(tmp_path_factory.mktemp("speakers"))
