"""Text for training and for the loss: what every machine has, or any files."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import train_tiny

#: What every machine has: name -> what it is.
BUILT_IN = {
    "stdlib": "source of Python's standard library",
    "stdlib-docs": "its documentation strings, comments, and the manual that help() shows",
}
_PIECE = 16_384  # characters: pieces of long files fall to training or are held out, each whole
_HELD_OUT = 20  # one piece in so many


def pieces(source: str) -> Iterator[str]:
    """A text in pieces of some 16 000 characters, in a fixed order.

    Args:
        source: A name of `BUILT_IN`, a text file, or a folder of ``.txt``, ``.rst``, ``.md`` and ``.py`` files.
    """
    for text in _documents(source):
        piece, size = [], 0
        for line in text.splitlines(keepends=True):
            piece.append(line)
            size += len(line)
            if size >= _PIECE:
                yield "".join(piece)
                piece, size = [], 0
        if size:
            yield "".join(piece)


def _documents(source: str) -> Iterator[str]:
    if source == "stdlib":
        for path in train_tiny.modules():
            yield path.read_text(encoding="utf-8", errors="replace")
    elif source == "stdlib-docs":
        for text in _documents("stdlib"):
            try:
                yield "\n\n".join(train_tiny.prose(text))
            except SyntaxError:
                continue
        yield from train_tiny.manual_topics().values()
    else:
        path = Path(source)
        files = [path]
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".rst", ".md", ".py"))
        for file in files:
            yield file.read_text(encoding="utf-8", errors="replace")


def fingerprint(sources: Sequence[str]) -> str:
    """Eight hexadecimal digits of what is in the texts."""
    digest = hashlib.sha256()
    for source in sources:
        for piece in pieces(source):
            digest.update(piece.encode())
    return digest.hexdigest()[:8]


def sides(sources: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training and held-out pieces; which is which is decided by the text of a piece alone."""
    found: tuple[list[str], list[str]] = ([], [])
    for source in sources:
        for piece in pieces(source):
            found[zlib.crc32(piece.encode()) % _HELD_OUT == 0].append(piece)
    return found


def tokens(tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """All pieces in one row, the start token before each: (n,) int64."""
    rows = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return torch.tensor([token for row in rows for token in (*start, *row.ids)])
