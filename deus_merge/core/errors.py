"""All errors that are reported to users.

::

    DeusMergeError            exit code 2: the user's input is wrong
    ├── RecipeError           the YAML, its keys, methods and parameters
    ├── ArchitectureError     config.json or tensor names do not match a known family
    ├── CheckpointError       a safetensors file, an index, a folder
    ├── PlanError             the recipe is readable but cannot be carried out (space, memory, output folder)
    ├── SolverError           an optimal transport problem that has no meaningful solution
    ├── TrainingError         a model in training that differs from its manifest, or settings a trainer lacks
    ├── MachineError          exit code 1: a full disk, a failing device: the input is right, finished work remains
    └── VerifyError           exit code 3: a finished checkpoint differs from its plan

Anything else that escapes is a bug (exit code 1).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable

from .urls import redacted

_LONGEST = 1000  # characters of one part of a message


class DeusMergeError(Exception):
    """A mistake that the user can correct. Its text says where it is, what is wrong, expected, got, what to do.

    Args:
        message: The problem in one sentence.
        where: The place: a recipe path with its line, a file, a tensor name. Shown by ``str``, as are the next two.
        expected: A correct value, or a description of one.
        got: The value that was found.
        hint: Advice on what to do now.
    """

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
    ):
        self.message = message
        self.where = where
        self.expected = expected
        self.got = got
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        lines = [_brief(self.message) if self.where is None else f"{_brief(self.where)}: {_brief(self.message)}"]
        details = (("expected: ", self.expected), ("got:      ", self.got), ("hint:     ", self.hint))
        return "\n".join(lines + [f"  {label}{_brief(value)}" for label, value in details if value is not None])


def add_hint(error: BaseException, hint: str) -> None:
    """Add advice on how to go on to what stops a run: to the hint of an error of ours, or to the notes of another one.

    A result that failed its verification is not one to go on with: that error gets a note.
    """
    if isinstance(error, DeusMergeError) and not isinstance(error, VerifyError):
        error.hint = f"{error.hint}; {hint}" if error.hint else hint
    else:
        notes = [*getattr(error, "__notes__", ()), hint]  # BaseException.add_note came with Python 3.11
        setattr(error, "__notes__", notes)  # noqa: B010


class RecipeError(DeusMergeError):
    """The recipe is invalid."""


class ArchitectureError(DeusMergeError):
    """A model's config.json and tensor names do not match each other or a known family."""


class CheckpointError(DeusMergeError):
    """A checkpoint's files are missing, damaged or hostile."""


class PlanError(DeusMergeError):
    """A valid recipe cannot be carried out with these models or on this machine."""


class SolverError(DeusMergeError):
    """An optimal transport problem has no meaningful solution."""


class TrainingError(DeusMergeError):
    """A model in training differs from its manifest, or a trainer cannot train the new layers alone."""


class MachineError(DeusMergeError):
    """The machine failed during a run: no space left, an input/output error."""

    exit_code = 1


class VerifyError(DeusMergeError):
    """A finished checkpoint differs from its plan."""

    exit_code = 3


def printable(value: object) -> str:
    """``str(value)`` with control characters escaped, so that a hostile name cannot drive a terminal."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def json_text(data: object, indent: int | None = None) -> str:
    """JSON text in which letters of any script are written as they are and unprintable characters are escaped."""
    text = json.dumps(data, indent=indent, ensure_ascii=False)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def _brief(value: object) -> str:
    """`printable`, cut to a length at which a very long name does not hide the message, and without the passwords and
    signatures of addresses."""
    text = redacted(printable(value))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def nearest(word: str, known: Iterable[str], most: int = 1) -> str | None:
    """A hint with the known spelling closest to ``word``, or the ``most`` closest; None when none is close.
    The word itself is none: whatever is wrong, it is not its spelling."""
    close = difflib.get_close_matches(str(word), sorted(set(known) - {str(word)}), n=most, cutoff=0.6)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else None
