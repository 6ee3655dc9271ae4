"""The results of a comparison in its folder: a line for each run, and the settings that all of them share."""

from __future__ import annotations

import fcntl
import json
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...core.errors import TrainingError
from .candidates import CALIBRATED, Candidate, Fixed, is_recipe

RUNS, SETTINGS, WORK = "runs.jsonl", "comparison.json", "work"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Be the only process that writes results to a folder, whose `WORK` exists.

    Raises:
        TrainingError: another one does.
    """
    with open(folder / WORK / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            hint = "wait for it, stop it, or choose another folder with --out"
            raise TrainingError("another comparison is running there", where=folder, hint=hint) from None
        yield


class Results:
    """The results of a folder, in memory and as lines of a file."""

    def __init__(self, out: Path, fixed: Fixed):
        self.fixed, self._folder, self._path = fixed, out, out / RUNS
        self.runs: list[dict[str, Any]] = []
        if self._path.exists():
            text = self._path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # a killed run may have left half a line
            if whole != text:
                self._path.write_text(whole, encoding="utf-8")
            self.runs = [_read(line) for line in whole.splitlines()]

    def begin(self) -> None:
        """Write the settings that all results share."""
        part = self._folder / f"{SETTINGS}.part"
        part.write_text(json.dumps(vars(self.fixed), indent=1) + "\n", encoding="utf-8")
        os.replace(part, self._folder / SETTINGS)

    def add(self, result: dict[str, Any]) -> None:
        self.runs.append(result)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(_line(result) + "\n")

    def check_recipe(self, candidate: Candidate, plan_hash: str) -> None:
        """Check that earlier results are those of the recipe as it is now.

        Raises:
            TrainingError: its file was changed.
        """
        if is_recipe(candidate.init.removeprefix(CALIBRATED)):
            for run in self.of([candidate]):
                if not run.get("checkpoint", plan_hash).startswith(plan_hash[:16]):
                    hint = "give the changed recipe another name, or choose another folder with --out"
                    message = "the recipe changed since it ran"
                    raise TrainingError(message, where=candidate.init, got=f"results in {self._folder}", hint=hint)

    def of(self, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
        """The results of some candidates."""
        wanted = {(c.init, c.insert, c.optimizer) for c in candidates}
        return [r for r in self.runs if (r["init"], r["insert"], r["optimizer"]) in wanted]

    def usual_seconds(self) -> float:
        """The median time of a run; 0 before the first one."""
        return statistics.median(r["seconds"] for r in self.runs) if self.runs else 0.0


def _line(result: dict[str, Any]) -> str:
    """A result as JSON, which has no infinity: null is the loss of a run that diverged."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({name: plain(value) for name, value in result.items()}, allow_nan=False)


def _read(line: str) -> dict[str, Any]:
    result = json.loads(line)
    result["curve"] = [(tokens, math.inf if loss is None else loss) for tokens, loss in result["curve"]]
    for name in ("initial", "final", "base_before", "base_after"):
        if name in result and result[name] is None:
            result[name] = math.inf
    return result


def check_settings(out: Path, fixed: Fixed) -> bool:
    """Compare with the settings of earlier results in a folder.

    Returns:
        Whether there are none.

    Raises:
        TrainingError: they differ, or the folder has other files.
    """
    file = out / SETTINGS
    if not file.exists():
        if out.exists() and (not out.is_dir() or set(os.listdir(out)) - {WORK}):
            hint = "choose another folder with --out"
            raise TrainingError("the folder has other files, and no comparison", where=out, hint=hint)
        return True
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
        differing = {k: v for k, v in vars(fixed).items() if earlier[k] != v}
    except (ValueError, KeyError, TypeError):
        raise TrainingError("not the settings of a comparison", where=file, hint="choose another folder") from None
    if differing:
        raise TrainingError(
            "the folder has results of other settings",
            where=out,
            expected=", ".join(f"{name}: {earlier[name]}" for name in differing),
            got=", ".join(f"{name}: {value}" for name, value in differing.items()),
            hint="choose another folder with --out",
        )
    return False
