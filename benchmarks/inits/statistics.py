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


def slope(runs: Runs) -> float:
    """Nats by which the loss falls while the tokens grow e-fold: least squares over the points from a quarter of the
    tokens on, means over seeds."""
    curves = [run["curve"] for run in runs.values()]
    tokens = np.array([t for t, _ in curves[0]])
    losses = np.mean([[loss for _, loss in curve] for curve in curves], axis=0)
    late = tokens >= tokens[-1] / 4
    return -float(np.polyfit(np.log(tokens[late]), losses[late], 1)[0])


def token_ratio(ours: Runs, theirs: Runs) -> Interval:
    """Tokens that ours needs to come to their final loss, over theirs. Curves of single runs are too rough to be read
    off: the difference of final losses is turned into tokens by the slope of theirs."""
    return Interval(*(math.exp(d / slope(theirs)) for d in difference(ours, theirs)))
