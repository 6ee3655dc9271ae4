"""Means over seeds, paired differences, and how many tokens one candidate needs to reach the loss of another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Run = Mapping[str, Any]
Runs = Mapping[int, Run]  # seed -> run


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval (Student's t over seeds)."""

    mean: float
    low: float
    high: float

    def __format__(self, form: str) -> str:
        if math.isnan(self.low):
            return format(self.mean, form)
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values; without ends for a single one, and where a run diverged."""
    import numpy as np
    from scipy import stats

    mean = sum(values) / len(values)
    if len(values) < 2 or not math.isfinite(mean):
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def mean(runs: Runs, key: str) -> float:
    """The mean of a value over seeds."""
    return sum(run[key] for run in runs.values()) / len(runs)


def difference(runs: Runs, reference: Runs, key: str = "final") -> Interval | None:
    """The difference of a value, seed by seed; below 0 where it is lower than the reference's. None without a seed that
    both have."""
    seeds = sorted(runs.keys() & reference.keys())
    return interval([runs[s][key] - reference[s][key] for s in seeds]) if seeds else None


def slope(runs: Runs) -> float:
    """By how many nats the loss falls while the tokens grow e-fold: least squares over the points of the mean curve
    from a quarter of the tokens on."""
    import numpy as np

    curves = [run["curve"] for run in runs.values()]
    tokens = np.array([t for t, _ in curves[0]], dtype=float)
    losses = np.mean([[loss for _, loss in curve] for curve in curves], axis=0)
    late = (tokens >= tokens[-1] / 4) & (tokens > 0)
    if late.sum() < 2 or not np.isfinite(losses[late]).all():
        return math.nan
    return -float(np.polyfit(np.log(tokens[late]), losses[late], 1)[0])


def token_ratio(runs: Runs, reference: Runs) -> Interval | None:
    """Tokens needed to reach the reference's final loss, over the tokens of the reference.

    First crossings of single curves are too rough: the difference of the final losses becomes tokens by the slope of
    the reference's mean curve. None where that curve does not fall.
    """
    apart, falls = difference(runs, reference), slope(reference)
    if apart is None or not falls > 0 or not math.isfinite(apart.mean):
        return None
    return Interval(*(math.exp(min(d / falls, 50.0)) for d in apart))


def at_compute(run: Run, tflop: float) -> float:
    """The held-out loss of a run after some computation, interpolated in the logarithm of the tokens.

    Args:
        run: A result.
        tflop: The computation, at most that of the whole run.
    """
    import numpy as np

    points = [(math.log(t), loss) for t, loss in run["curve"] if t > 0]
    if not 0 < tflop < run["tflop"]:
        return points[-1][1]
    first, last = run["curve"][0][0], run["curve"][-1][0]  # calibration used the first tokens
    tokens = math.log(first + (last - first) * tflop / run["tflop"])
    return float(np.interp(tokens, [t for t, _ in points], [loss for _, loss in points]))
