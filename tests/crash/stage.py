"""Runs that may die: a process that runs ``deus-merge`` a hundred times a minute, and the outputs of its runs."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

WARM = Path(__file__).with_name("warm.py")
MANIFEST = "deus_merge.json"


@dataclass
class Ended:
    """How a run ended: its exit code or minus the signal, None when it is stopped."""

    code: int | None
    out: str = ""
    err: str = ""
    steps: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    seconds: float = 0.0
    pid: int = 0


class Warm:
    """A process that has imported everything, and forks a child a run."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "DEUS_MERGE_CACHE": ""}
        command = [sys.executable, str(WARM)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdout.readline() == "ready\n"

    def run(self, folder: Path, *arguments, **request) -> Ended:
        """Run the command in a folder; ``fault``, ``seconds``, ``user``: see warm.py."""
        return self._ask({"run": [str(a) for a in arguments], "folder": str(folder), **request})

    def signal(self, ended: Ended, name: str) -> Ended:
        """Send a signal to a stopped run."""
        return self._ask({"pid": ended.pid, "signal": name})

    def prime(self, *arguments) -> None:
        """Run a command in the process itself, so that late imports happen once."""
        assert self._ask({"prime": [str(a) for a in arguments]}).code == 0

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _ask(self, request: dict) -> Ended:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        ended = Ended(**json.loads(self._process.stdout.readline()))
        assert not ended.unseen, f"not counted: {ended.unseen}"
        return ended


def content(folder: Path) -> dict[str, object]:
    """Every file's bytes; the manifest without its times, and without its seal, which covers them."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    if MANIFEST in found:
        timed = ("seconds", "date", "sha256")
        found[MANIFEST] = json.loads(found[MANIFEST], object_hook=lambda d: {k: d[k] for k in d if k not in timed})
    return found


@dataclass
class Stage:
    """One kind of run: its command, its output, and the folder that was there before.

    Attributes:
        steps: The steps of an undisturbed run.
        seconds: The duration of an undisturbed run.
        new: The content of its output.
        old: The content of the folder that it replaces; None without one.
    """

    warm: Warm
    root: Path
    arguments: tuple
    exchange: bool
    before: Path | None
    numbers: Iterator[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self.old = content(self.before) if self.before else None
        ended = self.run(folder := self.folder())
        assert ended.code == 0, ended.err
        self.new, self.steps, self.seconds = content(folder / "out"), ended.steps, ended.seconds
        assert os.listdir(folder) == ["out"]

    def folder(self) -> Path:
        """A new place to run in."""
        folder = self.root / str(next(self.numbers))
        folder.mkdir()
        if self.before:
            shutil.copytree(self.before, folder / "out")
        return folder

    def run(self, folder: Path, *more, **request) -> Ended:
        request["fault"] = {"exchange": self.exchange} | request.get("fault", {})
        overwrite = ["--overwrite"] if self.before else []
        return self.warm.run(folder, *self.arguments, *overwrite, *more, **request)

    def check_state(self, folder: Path, context: str) -> None:
        """OUT is absent, or the old one whole, or the new one whole; nothing else is in its parent."""
        old = folder / ".out.deus-tmp/old"
        if (folder / "out").exists():
            assert content(folder / "out") in (self.old, self.new), context
        elif self.old is not None:
            assert not self.exchange and content(old) == self.old, context
        assert set(os.listdir(folder)) <= {"out", ".out.deus-tmp", ".out.deus-lock"}, context

    def check_resumes(self, folder: Path, context: str, **request) -> None:
        """``--resume`` ends with the bytes of an undisturbed run, and leaves nothing else."""
        ended = self.run(folder, "--resume", **request)
        assert ended.code == 0, f"{context}\n{ended.err}"
        assert content(folder / "out") == self.new, context
        assert os.listdir(folder) == ["out"], context
        shutil.rmtree(folder)

    def spread(self, points: int, seed: int, last: int = 0) -> list[int]:
        """Steps spread over the whole run, and each of the last ones."""
        every = len(self.steps) / points
        chosen = {1 + int(i * every + random.Random(f"{seed} {i}").random() * every) for i in range(points)}
        return sorted(chosen | set(range(len(self.steps) - last + 1, len(self.steps) + 1)))
