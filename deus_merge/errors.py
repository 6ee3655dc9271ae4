"""Every error a user can meet.

::

    DeusMergeError            exit code 2: the user's input is wrong
    ├── RecipeError           the YAML, its keys, methods and parameters
    ├── ArchitectureError     config.json or tensor names do not fit a known family
    ├── CheckpointError       a safetensors file, an index, a folder
    ├── PlanError             the recipe is readable but cannot be carried out (space, memory, output folder)
    ├── SolverError           an optimal transport problem that has no meaningful solution
    ├── MachineError          exit code 1: a full disk, a failing device: the input is right, and the work is kept
    └── VerifyError           exit code 3: a finished checkpoint is not what its plan says

Anything else that escapes is a bug (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeusMergeError(Exception):
    """A mistake the user can mend, told as: where, what is wrong, expected, got, what to do.

    Args:
        message: What is wrong, one sentence.
        where: The place: a recipe path with its line, a file, a tensor name.
        expected: What would have been right.
        got: What came instead.
        hint: What to do now.
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
        head = f"{printable(self.where)}: {self.message}" if self.where is not None else self.message
        lines = [head]
        if self.expected is not None:
            lines.append(f"  expected: {printable(self.expected)}")
        if self.got is not None:
            lines.append(f"  got:      {printable(self.got)}")
        if self.hint is not None:
            lines.append(f"  hint:     {self.hint}")
        return "\n".join(lines)


class RecipeError(DeusMergeError):
    """The recipe cannot be read as one."""


class ArchitectureError(DeusMergeError):
    """A model's config or tensor names do not fit what was asked of it."""


class CheckpointError(DeusMergeError):
    """A checkpoint's files are missing, damaged or hostile."""


class PlanError(DeusMergeError):
    """A readable recipe that cannot be carried out here."""


class SolverError(DeusMergeError):
    """An optimal transport problem without a meaningful solution."""


class MachineError(DeusMergeError):
    """The machine failed while a run was at work: no space left, an input/output error."""

    exit_code = 1


class VerifyError(DeusMergeError):
    """A finished checkpoint is not what its plan says."""

    exit_code = 3


def printable(value: object) -> str:
    """``str(value)`` with control characters escaped, so that a hostile name cannot drive a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """A hint with the known spelling closest to ``word``; None when none is close."""
    close = difflib.get_close_matches(str(word), sorted(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else None
