"""Where this machine has the sources of its outputs: paths that an output must not name, since people share it.

``~/.cache/deus_merge/sources/DIGEST`` holds the folder in which a source was when an output was made from it; DIGEST is
the source's ``contents`` in the manifest. So ``verify`` and ``strip`` find sources again on the machine that made an
output, and nowhere else. Losing these files loses nothing: ``--source`` says where a source is. ``DEUS_MERGE_CACHE`` is
another folder for them; where it is empty, nothing is noted.
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
    for source in sources if _cache() else ():
        if source.contents and source.folder and os.path.isabs(source.folder):
            with suppress(OSError, ValueError):
                _write(Path(_cache(), source.contents), source.folder)


def known_folder(contents: str) -> str | None:
    """The folder in which this machine had a source when it last used it, if it is still there.

    Args:
        contents: The ``contents`` of the source.
    """
    if not (_cache() and re.fullmatch(r"[0-9a-f]{64}", contents)):
        return None
    try:
        folder = os.fsdecode(Path(_cache(), contents).read_bytes())
    except (OSError, ValueError):
        return None
    return folder if os.path.isabs(folder) and os.path.exists(folder) else None


def _cache() -> str:
    """The folder of the notes; empty where there are none."""
    usual = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "deus_merge")
    folder = os.environ.get("DEUS_MERGE_CACHE", usual)
    return os.path.join(folder, "sources") if folder else ""


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}")
    part.write_bytes(os.fsencode(text))
    os.replace(part, file)
