"""Where this machine has the sources of its outputs: paths that an output must not name, since people share it.

``~/.cache/deus_merge/sources/DIGEST`` holds the folder in which a source was when an output was made from it; DIGEST is
the source's ``contents`` in the manifest. So ``verify`` and ``strip`` find sources again on the machine that made an
output, and nowhere else. Losing these files loses nothing: ``--source`` says where a source is.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .manifest_parts import ManifestSource


def remember(sources: Iterable[ManifestSource]) -> None:
    """Note the folders of local sources. Where the cache cannot be written, nothing is noted.

    Args:
        sources: As this machine has them, with absolute folders.
    """
    for source in sources:
        if source.contents and source.folder and os.path.isabs(source.folder):
            with suppress(OSError):
                _write(_cache() / source.contents, source.folder)


def known_folder(contents: str) -> str | None:
    """The folder in which this machine had a source when it last used it, if it is still there.

    Args:
        contents: The ``contents`` of the source.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", contents):
        return None
    try:
        folder = (_cache() / contents).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    return folder if os.path.isabs(folder) and os.path.exists(folder) else None


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("DEUS_MERGE_CACHE") or Path(home, "deus_merge")) / "sources"


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)
