"""The files next to a model's weights, and in the folders that are part of a model."""

from __future__ import annotations

import re
from pathlib import Path

from ..core.errors import CheckpointError

#: folders that loaders read: modules of sentence-transformers (``1_Pooling``), more chat templates, generation code
PART = re.compile(r"[0-9]{1,2}_[A-Z][A-Za-z0-9]+|additional_chat_templates|custom_generate")


def side_files(folder: Path) -> dict[str, Path]:
    """Every file of a model's folder: name -> path. Names in a folder that is part of the model are like
    ``1_Pooling/config.json``; other folders are left out.

    Raises:
        CheckpointError: a folder cannot be read.
    """
    found: dict[str, Path] = {}
    try:
        for path in sorted(folder.iterdir()):
            if not path.is_dir():
                found[path.name] = path
            elif PART.fullmatch(path.name):
                found |= {f"{path.name}/{inner.name}": inner for inner in sorted(path.iterdir()) if not inner.is_dir()}
    except OSError as error:
        raise CheckpointError("the folder cannot be read", where=error.filename, got=error.strerror) from None
    return found
