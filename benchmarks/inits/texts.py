"""The texts that every machine has: Python's standard library, its source and its prose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks import train_tiny

BUILT_IN = {
    "stdlib": "source of Python's standard library",
    "stdlib-docs": "its documentation strings, comments, and the manual that help() shows",
}


def text_files(sources: tuple[str, ...], scratch: Path) -> list[Path]:
    """The files of texts.

    Args:
        sources: Names of `BUILT_IN`, files or folders.
        scratch: Where built-in texts are written to.
    """
    return [_written(source, scratch) if source in BUILT_IN else Path(source) for source in sources]


def _written(name: str, scratch: Path) -> Path:
    file = scratch / f"{name}.txt"
    if not file.exists():
        scratch.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text("\n\n".join(_documents(name)), encoding="utf-8")
        part.rename(file)
    return file


def _documents(name: str) -> Iterator[str]:
    for path in train_tiny.modules():
        source = path.read_text(encoding="utf-8", errors="replace")
        try:
            yield source if name == "stdlib" else "\n\n".join(train_tiny.prose(source))
        except SyntaxError:
            continue
    if name == "stdlib-docs":
        yield from train_tiny.manual_topics().values()
