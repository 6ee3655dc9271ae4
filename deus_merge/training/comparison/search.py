"""Which run comes next: the learning rates of each candidate, then its seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from .candidates import Candidate
from .statistics import Run, Runs

Rates = Mapping[float, Runs]  # learning rate -> seed -> run
_FIRST = {"adamw": 1e-3, "muon": 1e-3, "all": 1e-4, "top": 3e-4, "lora": 1e-3}
_MOST_RATES = 9  # of a candidate
SEED = 0  # of the search


def by_candidate(runs: Iterable[Run]) -> dict[Candidate, dict[float, dict[int, Run]]]:
    """The results by candidate, learning rate and seed."""
    found: dict[Candidate, dict[float, dict[int, Run]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        candidate = Candidate(run["init"], run["insert"], run["optimizer"])
        found[candidate][run["lr"]][run["seed"]] = run
    return found


def best_lr(rates: Rates) -> float | None:
    """The rate with the lowest final loss in the search; None before its first run."""
    searched = [(runs[SEED]["final"], lr) for lr, runs in rates.items() if SEED in runs]
    return min(searched)[1] if searched else None


def best_runs(rates: Rates) -> Runs:
    """The runs at the best rate, by seed."""
    lr = best_lr(rates)
    return rates[lr] if lr is not None else {}


class Search:
    """The order of the runs.

    Args:
        candidates: What is compared.
        seeds: Runs of each at its best rate.
        rates: Learning rates to begin with; None for the usual ones.
        rates_per_decade: How near to each other rates are tried.
    """

    def __init__(
        self, candidates: Sequence[Candidate], seeds: int, rates: Sequence[float] | None, rates_per_decade: int
    ):
        self._candidates, self._seeds = candidates, seeds
        self._rates, self._per_decade = rates, rates_per_decade

    def next_jobs(self, runs: Iterable[Run]) -> list[tuple[Candidate, float, int]]:
        """The runs that are due, the first one first: rates of all candidates, then seeds in turn.

        The candidates of one kind (an optimizer; what trains without growing) begin at the best rate of the first of
        them, so they wait for it.

        Args:
            runs: The results so far.
        """
        found = by_candidate(runs)
        leaders: dict[str, Candidate] = {}
        jobs = []
        for candidate in self._candidates:
            leader = leaders.setdefault(f"{_kind(candidate)} {candidate.optimizer}", candidate)
            if leader is candidate:
                jobs += [(candidate, lr, SEED) for lr in self._due(candidate, found[candidate], None)]
            elif not self._due(leader, found[leader], None):
                start = best_lr(found[leader])
                jobs += [(candidate, lr, SEED) for lr in self._due(candidate, found[candidate], start)]
        if jobs:
            return jobs
        for seed in range(self._seeds):
            for candidate in self._candidates:
                lr = best_lr(found[candidate])
                if lr is not None and seed not in found[candidate][lr]:
                    jobs.append((candidate, lr, seed))
        return jobs

    def left(self, runs: Iterable[Run]) -> int:
        """About how many runs are left: three rates of each candidate, and its other seeds."""
        found = by_candidate(runs)
        left = 0
        for candidate in self._candidates:
            searched = sum(SEED in of for of in found[candidate].values())
            seeds = len(best_runs(found[candidate]))
            left += max(0, len(self._rates or "123") - searched) + max(0, self._seeds - max(1, seeds))
        return max(left, len(self.next_jobs(runs)))

    def _due(self, candidate: Candidate, rates: Rates, start: float | None) -> list[float]:
        """The rates to try next: those that were given, or until the best one has a worse one on both sides."""
        tried = sorted(lr for lr, runs in rates.items() if SEED in runs)
        if self._rates is not None:
            return [lr for lr in self._rates if lr not in tried]
        middle = start if start is not None else _FIRST[_kind(candidate)]
        first = [self._beside(middle, steps) for steps in (0, -1, 1)]
        best = best_lr(rates)
        if best is None or len(tried) < len(first):
            return [lr for lr in first if lr not in tried]
        if len(tried) >= _MOST_RATES or best not in (tried[0], tried[-1]):
            return []
        return [self._beside(best, -1 if best == tried[0] else 1)]

    def _beside(self, lr: float, steps: int) -> float:
        """A rate so many steps above another one, of a geometric grid through 1."""
        place = round(math.log10(lr) * self._per_decade) + steps
        return float(f"{10 ** (place / self._per_decade):.3g}")


def _kind(candidate: Candidate) -> str:
    """What decides the usual learning rate of a candidate."""
    return candidate.parsed_optimizer.kind if candidate.grown else candidate.init.partition(":")[0]
