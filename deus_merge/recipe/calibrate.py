"""The ``calibrate:`` section of a recipe: the outputs of new layers are set in closed form from a text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..core.errors import PlanError
from ..core.located import Located
from ..core.parameters import as_number
from .references import from_file

METHODS = ("ridge", "kfac")


@dataclass(frozen=True)
class CalibrationSettings:
    """The settings of a calibration that decide its result, besides model and text.

    Attributes:
        tokens: Tokens of the text that are used at most, fitted and held out together.
        length: Tokens of a window; nothing is read across windows.
        held_out: The share of the windows that is not fitted: their loss chooses the step size.
        method: ``ridge`` or ``kfac``.
        damping: Multiple of the mean diagonal entry that is added to the diagonals.
        batch: Windows that are computed at once.
        seed: Decides which windows are held out.
    """

    tokens: int = 16_384
    length: int = 256
    held_out: float = 0.25
    method: str = "kfac"
    damping: float = 0.3
    batch: int = 4
    seed: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """These values, by name."""
        return {name: getattr(self, name) for name in _SETTINGS}


_SETTINGS = tuple(f.name for f in fields(CalibrationSettings))
_KEYS = ("text", *_SETTINGS)


@dataclass(frozen=True, kw_only=True)
class Calibrate(CalibrationSettings):
    """A ``calibrate:`` section.

    Attributes:
        text: The path of the text.
        place: The place in the recipe.
    """

    text: str
    place: Located = field(compare=False, repr=False, default=Located(None))

    def at(self, key: str) -> Located:
        """The place of a key, or of the section where the recipe does not set it."""
        return self.place.value.get(key, self.place) if isinstance(self.place.value, dict) else self.place


def misfit(settings: CalibrationSettings, window: str = "length") -> tuple[str, str] | None:
    """The first setting that is out of range.

    Args:
        settings: All of them.
        window: How the user knows the length of a window.

    Returns:
        Its name and what is expected; None if all are possible.
    """
    wanted = {
        "length": ("at least 2", settings.length >= 2),
        "tokens": (f"at least two windows: 2 x {window}", settings.tokens >= 2 * settings.length),
        "held_out": ("more than 0 and less than 1", 0 < settings.held_out < 1),
        "method": (" or ".join(METHODS), settings.method in METHODS),
        "damping": ("more than 0, at most 1e6", 0 < settings.damping <= 1e6),
        "batch": ("at least 1", settings.batch >= 1),
        "seed": ("0 to 2**63 - 1", 0 <= settings.seed < 2**63),
    }
    return next(((name, expected) for name, (expected, fits) in wanted.items() if not fits), None)


def read_calibrate(node: Located) -> Calibrate:
    """Read a ``calibrate:`` section.

    Raises:
        RecipeError: an unknown key, no text, or a value of the wrong type or out of range.
    """
    keys = node.mapping(_KEYS, "a calibrate section")
    if "text" not in keys:
        node.fail("calibrate needs a text", expected="text: a file with text like that of the training")
    given: dict[str, Any] = {"text": from_file(keys["text"].string("the path of a text file"), keys["text"].file)}
    for name in ("tokens", "length", "batch", "seed"):
        if name in keys:
            given[name] = keys[name].integer()
    for name in ("held_out", "damping"):
        if name in keys:
            number = as_number(keys[name].value)
            if number is None or not math.isfinite(number):
                keys[name].fail("wrong value", expected="a number")
            given[name] = float(number)
    if "method" in keys:
        given["method"] = keys["method"].choice(METHODS, "method of calibration")
    found = Calibrate(**given, place=node)
    if wrong := misfit(found):
        found.at(wrong[0]).fail(f"{wrong[0]} is out of range", expected=wrong[1], got=str(getattr(found, wrong[0])))
    return found


def read_text(path: str | Path, where: object) -> str:
    """The text of a calibration; what is not UTF-8 is replaced.

    Args:
        path: The file.
        where: Its place in messages.

    Raises:
        PlanError: it cannot be read, is empty, or is no text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", None) or str(error)
        raise PlanError(
            "the text cannot be read", where=where, expected="a text file", got=f"{path}: {reason}"
        ) from None
    if "\0" in text:
        expected = "a text file in UTF-8"
        raise PlanError("not a text file", where=where, expected=expected, got=f"{path}: bytes that are 0")
    if not text.strip():
        raise PlanError("the text is empty", where=where, expected="a text file", got=path)
    return text
