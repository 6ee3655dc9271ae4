"""Means over seeds, paired differences, and how many tokens one init needs to come as far as another."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval (Student's t over seeds)."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Of the mean of independent values; without ends for a single one."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


Runs = dict[int, dict]  # seed -> run


def by_init(runs: Iterable[Mapping]) -> dict[str, dict[float, Runs]]:
    """init -> learning rate -> seed -> run."""
    found: dict[str, dict[float, Runs]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        found[run["init"]][run["lr"]][run["seed"]] = dict(run)
    return found


def best_lr(rates: Mapping[float, Runs]) -> float:
    """The learning rate with the lowest final loss at the seed of the sweep, 0."""
    return min((runs[0]["final"], lr) for lr, runs in rates.items() if 0 in runs)[1]


def best_runs(runs: Iterable[Mapping]) -> dict[str, Runs]:
    """init -> its runs at its best learning rate."""
    return {init: rates[best_lr(rates)] for init, rates in by_init(runs).items()}


def difference(ours: Runs, theirs: Runs) -> Interval:
    """Of the final losses, seed by seed; below 0: ours is lower."""
    return interval([ours[s]["final"] - theirs[s]["final"] for s in sorted(ours.keys() & theirs.keys())])


def reaches(curve: Sequence[tuple[int, float]], loss: float) -> float:
    """Tokens at which a curve first comes down to a loss, linear between its points; infinity if it does not."""
    for (t0, l0), (t1, l1) in zip(curve, curve[1:], strict=False):
        if l1 <= loss:
            return t1 if l0 <= loss or l0 == l1 else t0 + (t1 - t0) * (l0 - loss) / (l0 - l1)
    return math.inf


def token_ratio(ours: Runs, theirs: Runs) -> Interval:
    """Tokens that ours needs to come to their final loss, over theirs; above 1 where it does not: then their tokens to
    ours, inverted. Geometric mean over seeds."""
    logs = []
    for seed in sorted(ours.keys() & theirs.keys()):
        a, b = ours[seed], theirs[seed]
        tokens = b["curve"][-1][0]
        mine = reaches(a["curve"], b["final"])
        logs.append(math.log(mine / tokens if mine <= tokens else tokens / max(1.0, reaches(b["curve"], a["final"]))))
    return Interval(*(math.exp(x) for x in interval(logs)))
