"""The text of a comparison: training and held-out windows of tokens."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...core.errors import TrainingError
from ...core.text import plural
from ..reading import check_rows

if TYPE_CHECKING:
    import torch

SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
_PIECE = 16_384  # characters: a long text falls to training or to the held-out part in such pieces
_HELD_OUT = 20  # one piece in so many is held out
_MOST = 256_000_000  # characters that are read


@dataclass(frozen=True)
class Tokens:
    """A text as tokens.

    Attributes:
        training: Token ids of the training part, (n,) int64.
        held_out: Token ids of the held-out part, (m,) int64.
        fingerprint: The first eight hexadecimal digits of the text's sha256.
    """

    training: torch.Tensor
    held_out: torch.Tensor
    fingerprint: str

    def windows(self, part: str, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """Windows drawn without replacement.

        Args:
            part: ``training`` or ``held_out``.
            count: The number of windows, w.
            length: The number of tokens in each, t.
            generator: Decides which ones, and their order.

        Returns:
            (w, t).

        Raises:
            TrainingError: the text has fewer windows.
        """
        import torch

        ids: torch.Tensor = getattr(self, part)
        found = len(ids) // length
        if found < count:
            raise TrainingError(
                f"the {part.replace('_', '-')} part of the text is too short",
                where="--text",
                expected=f"{plural(count, 'window')} of {plural(length, 'token')}",
                got=f"{plural(found, 'window')}",
                hint=(
                    "give more text"
                    if found == 0
                    else "give more text, or fewer tokens with --tokens, --held-out or --length"
                )
                + f" (every {_HELD_OUT}th piece of {_PIECE} characters is held out)",
            )
        chosen = torch.randperm(found, generator=generator)[:count]
        return ids[: found * length].view(found, length)[chosen]


class Pieces(NamedTuple):
    """A text in pieces: those to train on, those that are held out, and eight hexadecimal digits of its sha256."""

    training: list[str]
    held_out: list[str]
    fingerprint: str


def split(sources: Sequence[Path]) -> Pieces:
    """Split texts into training and held-out pieces; the text of a piece alone decides which it is.

    Args:
        sources: Files, or folders of files that end in `SUFFIXES`; of ``.jsonl`` the values of ``text`` are read.

    Raises:
        TrainingError: there is no text, or too much.
    """
    digest, size = hashlib.sha256(), 0
    sides: tuple[list[str], list[str]] = ([], [])
    for file in _files(sources):
        for piece in pieces(file):
            digest.update(piece.encode())
            sides[zlib.crc32(piece.encode()) % _HELD_OUT == 0].append(piece)
            size += len(piece)
            if size > _MOST:
                raise TrainingError("the text is too long", where="--text", expected=f"at most {_MOST} characters")
    if not size:
        raise TrainingError(
            "there is no text",
            where="--text",
            expected=f"a file with text, or a folder with files that end in {', '.join(SUFFIXES)}",
            got=", ".join(map(str, sources)),
        )
    return Pieces(*sides, digest.hexdigest()[:8])


def read_tokens(tokenizer: Any, text: Pieces, vocabulary: int) -> Tokens:
    """Read a text as tokens.

    Args:
        tokenizer: The model's tokenizer.
        text: The text.
        vocabulary: The number of tokens that the model has rows for.

    Raises:
        TrainingError: it has tokens that the model has no rows for.
    """
    training, held_out = tokens(tokenizer, text.training), tokens(tokenizer, text.held_out)
    for ids in (training, held_out):
        check_rows(ids, vocabulary, tokenizer, "--text")
    return Tokens(training, held_out, text.fingerprint)


def tokens_file(work: Path, model: str, fingerprint: str) -> Path:
    """The file of a text's tokens, as the tokenizer of a model makes them."""
    return work / f"text-{model}-{fingerprint}.pt"


def write_tokens(work: Path, model: str, text: Tokens) -> None:
    """Write the tokens of a text to the folder that runs share."""
    import torch

    work.mkdir(parents=True, exist_ok=True)
    file = tokens_file(work, model, text.fingerprint)
    content = io.BytesIO()
    torch.save({"training": text.training, "held_out": text.held_out}, content)  # to a full disk it would crash
    part = Path(f"{file}.part")
    try:
        part.write_bytes(content.getbuffer())
    except OSError:
        part.unlink(missing_ok=True)
        raise
    os.replace(part, file)


def tokens_of(work: Path, model: str, fingerprint: str) -> Tokens:
    """The tokens that `write_tokens` wrote."""
    import torch

    found = torch.load(tokens_file(work, model, fingerprint), weights_only=True)
    return Tokens(**found, fingerprint=fingerprint)


def tokens(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """All texts in one row, the start token before each: (n,) int64."""
    import torch

    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return torch.tensor([token for row in rows for token in (*start, *row)], dtype=torch.int64)


def pieces(file: Path) -> Iterator[str]:
    """A file's text in pieces of about 16 000 characters that end with a line.

    Raises:
        TrainingError: it cannot be read, or is no text.
    """
    for text in _documents(file):
        piece: list[str] = []
        size = 0
        for line in text.splitlines(keepends=True):
            for start in range(0, len(line), _PIECE):  # a text may be one line
                piece.append(line[start : start + _PIECE])
                size += len(piece[-1])
                if size >= _PIECE:
                    yield "".join(piece)
                    piece, size = [], 0
        if size:
            yield "".join(piece)


def _files(sources: Sequence[Path]) -> Iterator[Path]:
    """The files of texts in a fixed order, each once, however often it is named."""
    seen: set[Path] = set()
    for source in sources:
        files = [source]
        if source.is_dir():
            files = sorted(file for file in source.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        for file in files:
            if (real := file.resolve()) not in seen:
                seen.add(real)
                yield file


def _documents(file: Path) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise TrainingError("the text cannot be read", where=file, got=error.strerror) from None
    if "\0" in text:
        raise TrainingError("not a text file", where=file, expected="text in UTF-8", got="bytes that are 0")
    if file.suffix.lower() != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):  # strings may have other line ends, like U+2028
        if not line.strip():
            continue
        try:
            found = json.loads(line)["text"] + "\n"
        except (ValueError, TypeError, KeyError, RecursionError):
            where = f"{file}, line {number}"
            raise TrainingError("not a line of text", where=where, expected='{"text": "..."}', got=line[:80]) from None
        yield found.encode(errors="replace").decode()  # half of a character, written as an escape, is none
