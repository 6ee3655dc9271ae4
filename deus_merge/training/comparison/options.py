"""The options of a comparison."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import DeusMergeError, TrainingError
from ...core.located import Plain
from ...core.text import some_of
from ...run.device import check_device_name
from .candidates import UNGROWN, Candidate, check_init, is_recipe, parse_optimizer, shared_init

PRECISIONS = ("bfloat16", "float32")
_UNITS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600, "d": 86_400}
_MULTIPLES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Budget:
    """What a comparison may take.

    Attributes:
        seconds: Wall time, of this call; None without a limit.
        tokens: Training tokens of all runs together, earlier ones included; None without a limit.
    """

    seconds: float | None = None
    tokens: int | None = None


def parse_budget(text: str) -> Budget:
    """``90s``, ``30min``, ``2h``, or tokens: ``500k``, ``2M``, ``2_000_000 tokens``.

    Raises:
        DeusMergeError: it is neither.
    """
    match = re.fullmatch(r"\s*([\d_]+(?:\.\d+)?)\s*([kMG]?)\s*(tokens|s|sec|min|m|h|d)?\s*", text)
    number = float(match[1].replace("_", "") or 0) if match and match[1].strip("_") else 0.0
    if match is None or not number or (match[2] and match[3] not in (None, "tokens")):
        expected = "a time like 30min or 2h, or tokens like 500k or 2M"
        raise DeusMergeError("not a budget", where="--budget", expected=expected, got=text)
    if match[3] in (None, "tokens"):
        return Budget(tokens=int(number * _MULTIPLES[match[2]]))
    return Budget(seconds=number * _UNITS[match[3]])


@dataclass(frozen=True)
class CompareOptions:
    """What is compared, and how.

    Every combination of ``inits``, ``inserts`` and ``optimizers`` is a candidate; each is run at several learning
    rates with one seed until the best of them has a worse one on both sides, and at that one with the other seeds.

    Attributes:
        inits: How new layers begin: presets (``lesa{zero_init: true}`` sets parameters), files of recipes, either of
            them with ``calibrated:`` in front, or ``random_zero``. The first one is the reference.
        inserts: Places of new layers, as in a recipe.
        optimizers: ``adamw`` or ``muon``, each also with an output ratio: ``adamw:3``.
        without_growing: What trains in models that do not grow: ``all`` parameters, the ``top`` layers, a ``lora``
            adapter; ``top:N`` and ``lora:R`` set the number of layers and the rank, which are as large as the first
            candidate's new layers otherwise.
        tokens: Training tokens of a run.
        batch: Windows of a step.
        length: Tokens of a window.
        held_out: Windows on which losses are measured.
        seeds: Runs of each candidate at its best rate.
        rates: Learning rates to begin with; None to search from the usual ones.
        rates_per_decade: How near to each other rates are tried.
        calibration_tokens: Tokens of calibrated inits that go to calibration; None for an eighth of ``tokens``.
        precision: ``bfloat16`` (autocast, float32 for what trains) or ``float32``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        workers: Runs side by side, each a process.
        threads: CPU threads of a run; None to share them out.
        budget: What all of it may take.
    """

    inits: tuple[str, ...] = ("llama_pro", "copy_next", "opt_deus")
    inserts: tuple[Plain, ...] = ("even",)
    optimizers: tuple[str, ...] = ("adamw",)
    without_growing: tuple[str, ...] = ()
    tokens: int = 65_536
    batch: int = 2
    length: int = 256
    held_out: int = 16
    seeds: int = 3
    rates: tuple[float, ...] | None = None
    rates_per_decade: int = 2
    calibration_tokens: int | None = None
    precision: str = "bfloat16"
    device: str = "auto"
    workers: int = 1
    threads: int | None = None
    budget: Budget = Budget()

    def check(self) -> None:
        """Check every value.

        Raises:
            TrainingError, PlanError: one is out of range, or nothing is compared.
        """
        for init in self.inits:
            check_init(init)
        for text in self.optimizers:
            parse_optimizer(text)
        for text in self.without_growing:
            _check_ungrown(text)
        window = self.batch * self.length
        wanted = {
            "init": ("at least one", bool(self.inits)),
            "optimizer": ("at least one", bool(self.optimizers)),
            "insert": ("at least one", bool(self.inserts)),
            "length": ("at least 2", self.length >= 2),
            "batch": ("at least 1", self.batch >= 1),
            "tokens": (f"at least 8 steps: {8 * window}", self.tokens >= 8 * window),
            "held_out": ("at least 1", self.held_out >= 1),
            "seeds": ("at least 1", self.seeds >= 1),
            "lr": ("positive numbers", self.rates is None or (bool(self.rates) and all(map(_positive, self.rates)))),
            "rates_per_decade": ("1 to 16", 1 <= self.rates_per_decade <= 16),
            "calibration_tokens": (
                f"two windows to half of the tokens: {2 * self.length} to {self.tokens // 2}",
                self.calibration_tokens is None or 2 * self.length <= self.calibration_tokens <= self.tokens // 2,
            ),
            "precision": (" | ".join(PRECISIONS), self.precision in PRECISIONS),
            "workers": ("at least 1", self.workers >= 1),
            "threads": ("at least 1", self.threads is None or self.threads >= 1),
            "budget": (
                f"the tokens of one run at least: {self.steps * window if window > 0 else 0}",
                self.budget.tokens is None or self.budget.tokens >= self.steps * window,
            ),
        }
        got = {**vars(self), "lr": self.rates, "budget": f"{self.budget.tokens} tokens"}
        for name, (expected, fits) in wanted.items():
            if not fits:
                option = "--" + name.replace("_", "-")
                raise TrainingError("not a possible value", where=option, expected=expected, got=got[name])
        check_device_name(self.device)

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return self.tokens // max(1, self.batch * self.length)

    @property
    def tokens_of_calibration(self) -> int:
        """Tokens of calibrated inits that go to calibration."""
        return self.calibration_tokens or max(2 * self.length, self.tokens // 8 // self.length * self.length)

    def grown(self) -> list[Candidate]:
        """The candidates that grow, the reference first."""
        found = []
        for optimizer in self.optimizers:
            for init in map(shared_init, self.inits):
                inserts = [""] if is_recipe(init) else [json.dumps(insert) for insert in self.inserts]
                found += [Candidate(init, insert, optimizer) for insert in inserts]
        return list(dict.fromkeys(found))

    def ungrown(self, layers: int, rank: int) -> list[Candidate]:
        """The candidates that do not grow.

        Args:
            layers: The number of ``top`` layers, where none is given.
            rank: The rank of ``lora``, where none is given.
        """
        usual = {"top": layers, "lora": rank}
        inits = []
        for text in self.without_growing:
            kind, _, amount = text.partition(":")
            inits.append(f"{kind}:{int(amount or usual[kind])}" if kind in usual else kind)
        kinds = dict.fromkeys(parse_optimizer(text).kind for text in self.optimizers)  # nothing there began as zeros
        return list(dict.fromkeys(Candidate(init, "", kind) for kind in kinds for init in inits))


def _positive(rate: float) -> bool:
    return math.isfinite(rate) and rate > 0


def _check_ungrown(text: str) -> None:
    kind, colon, amount = text.partition(":")
    fits = kind in UNGROWN and (not colon or (kind != "all" and amount.isdecimal() and int(amount) > 0))
    if not fits:
        expected = "all | top | top:LAYERS | lora | lora:RANK"
        raise TrainingError(
            "not a way to train without growing", where="--without-growing", expected=expected, got=text
        )


def check_texts(sources: tuple[Path, ...], option: str) -> None:
    """Check that texts are there.

    Raises:
        TrainingError: one is missing.
    """
    missing = [str(source) for source in sources if not source.exists()]
    if missing:
        raise TrainingError("no such file or folder", where=option, got=some_of(missing))
