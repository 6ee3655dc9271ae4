"""The options of a calibration, and the windows of text that it uses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import PlanError, TrainingError
from ...core.text import plural
from ...recipe.calibrate import CalibrationSettings, misfit
from ...run.device import check_device_name
from ..reading import check_rows, load_tokenizer

if TYPE_CHECKING:
    import torch

_CHARACTERS = 32  # of text a token at most, nearly always


@dataclass(frozen=True)
class CalibrationOptions(CalibrationSettings):
    """How to calibrate: the settings that a recipe has, too, and those of the run.

    Attributes:
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        max_memory: Bytes the process may take; None for those of the machine.
        threads: CPU threads for arithmetic; None for torch's own choice.
        resume: Continue an interrupted run.
        overwrite: Replace an existing output, once the new one is complete.
    """

    device: str = "auto"
    max_memory: int | None = None
    threads: int | None = None
    resume: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """Check every value.

        Raises:
            PlanError: one is out of range.
        """
        if wrong := misfit(self, "--length"):
            name, expected = wrong
            option = "--" + name.replace("_", "-")
            raise PlanError("not a possible value", where=option, expected=expected, got=getattr(self, name))
        check_device_name(self.device)


@dataclass(frozen=True)
class Windows:
    """The tokens of a text in windows.

    Attributes:
        ids: Token ids, (w, t) int64: the fitted windows first, then those that are held out.
        fitted: The number of fitted windows.
        text_sha256: sha256 of the text in UTF-8.
    """

    ids: torch.Tensor
    fitted: int
    text_sha256: str

    @property
    def held_out(self) -> int:
        return len(self.ids) - self.fitted

    @property
    def length(self) -> int:
        return self.ids.shape[1]


def read_windows(
    folder: Path,
    text: str,
    options: CalibrationOptions,
    vocabulary: int,
    *,
    model: object = None,
    where: object = "--text",
) -> Windows:
    """Windows of a text, spread over all of it, by a model's own tokenizer.

    Args:
        folder: A folder with the tokenizer and config of the model.
        text: The text.
        options: Tokens, length, share that is held out, seed.
        vocabulary: The number of tokens that the model has rows for.
        model: The name of the model in messages; None for the folder.
        where: The place of the text in messages.

    Raises:
        TrainingError: there is no tokenizer, or the text has too few tokens, or tokens that the model lacks.
    """
    import torch

    model = folder if model is None else model
    tokenizer = load_tokenizer(folder, model)

    def tokens(part: str) -> list[int]:
        return tokenizer(part, verbose=False)["input_ids"]

    ids = _spread(text, tokens, options)
    if len(ids) < 2:
        raise TrainingError(
            "the text is too short",
            where=where,
            expected=f"at least two windows of {plural(options.length, 'token')}",
            got=f"{plural(len(tokens(text)), 'token')}",
            hint="give more text, or shorter windows (length)",
        )
    windows, count = torch.tensor(ids), len(ids)  # (w, t)
    check_rows(windows, vocabulary, tokenizer, model)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(options.seed))
    fitted = count - min(count - 1, max(1, round(options.held_out * count)))
    order = torch.cat([order[:fitted].sort().values, order[fitted:].sort().values])  # (w,)
    return Windows(windows[order], fitted, hashlib.sha256(text.encode()).hexdigest())


def _spread(text: str, tokens: Callable[[str], list[int]], options: CalibrationOptions) -> list[list[int]]:
    """Windows of a text, as many as are wanted where it has as many, evenly spread over all of it.

    Args:
        text: The text.
        tokens: The tokenizer.
        options: Tokens, length.
    """
    count, length = options.tokens // options.length, options.length
    reach = _CHARACTERS * length
    if len(text) > 2 * count * reach:  # a long text is not read as a whole: a window from each part of it
        found = []
        for i in range(count):
            at = i * len(text) // count
            line = text.find("\n", at, at + reach) + 1 or at  # from the beginning of a line, if there is one
            if len(ids := tokens(text[line : line + reach])) >= length:
                found.append(ids[:length])
        if len(found) >= 2:
            return found
    ids = tokens(text)
    total = len(ids) // length
    chosen = range(total) if total <= count else [i * total // count for i in range(count)]
    return [ids[i * length : (i + 1) * length] for i in chosen]
