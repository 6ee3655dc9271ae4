"""A short search for the learning rate of new layers, which leaves the model as it was."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import TrainingError
from ..core.text import plural
from .optimizers import check_rates, optimizer
from .restoring import restored

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

_FACTOR = 3.0  # between the rates of two runs
_RUNS = 5  # the highest at the rate that the ramp ends with
_LAST, _LONG = 3, 3  # the number of last runs, and their length in units of the others'
_UNITS = _LONG + _RUNS + _LAST * _LONG  # the untrained model's losses, the runs, the last ones
_LEAST_RAMP, _LEAST_RUN = 16, 4  # steps
_RISE = 0.5  # nats by which a batch's loss is above that of the untrained model: the run has diverged


@dataclass(frozen=True)
class LrSearch:
    """The result of `find_lr`. ``str()`` is a table.

    Attributes:
        kind: The optimizer.
        suggestion: The learning rate.
        curve: (learning rate, loss) of each run, from the lowest rate to the highest: the mean over the second half of
            its steps, in the model's unit (nats per token); infinity where it diverged.
        untrained: The same mean for the model without training.
        finals: (learning rate, loss) of the longer runs.
        ramp: (learning rate, loss) of each step of the ramp.
        reason: How the suggestion was chosen.
        tokens: The number of tokens that the search computed with.
        steps: The number of steps of each run; the longer ones have three times as many.
    """

    kind: str
    suggestion: float
    curve: tuple[tuple[float, float], ...]
    untrained: float
    finals: tuple[tuple[float, float], ...]
    ramp: tuple[tuple[float, float], ...]
    reason: str
    tokens: int
    steps: int

    def __str__(self) -> str:
        lines = [f"{self.kind}, {self.tokens:,} tokens in all", "learning rate  loss"]
        lines.append(f"{'untrained':<13}  {self.untrained:.4f}")
        for points, steps in ((self.curve, self.steps), (self.finals, _LONG * self.steps)):
            finite = [loss for _, loss in points if math.isfinite(loss)]
            low, high = min(finite, default=0.0), max(finite, default=0.0)
            lines.append(f"after {plural(steps, 'step')}")
            for lr, loss in points:
                bar = (
                    f"{loss:.4f}  {'#' * (1 + round(30 * (loss - low) / (high - low or 1)))}" if loss in finite else ""
                )
                lines.append(f"{lr:<13.2e}  {bar or 'diverged'}")
        return "\n".join([*lines, f"suggested: {self.suggestion:.2e}: {self.reason}"])


def find_lr(
    model: Module,
    path: Path | str,
    batches: Iterable[Any],
    *,
    kind: str = "adamw",
    budget_tokens: int = 100_000,
    loss: Callable[[Module, Any], Tensor] | None = None,
    max_grad_norm: float = 1.0,
    lowest: float = 1e-6,
    highest: float = 1.0,
    **settings: Any,
) -> LrSearch:
    """Search for a learning rate of the new layers by training them for some steps, again and again from the start.

    An eighth of the budget goes into a ramp: the rate rises from ``lowest`` to ``highest`` on one batch until the loss
    does. Five rates up to that of its lowest loss, each three times the one before, train on the same batches for
    equally many steps; the untrained model's losses on these say which diverge. Short runs favour high rates, by which
    long ones fail, and where there is little to learn they favour low ones: so the best rate and its two neighbours
    train once more, for three times as many steps. The best of these is suggested; the next lower one instead if its
    loss is not higher by more than a standard error (over batches, of the difference), or if by the trend of the
    difference it would be lower after as many steps again.

    Weights, buffers, gradients, random number generators and the mode of every module are as before when it returns
    or fails. Tokens that a search used have been seen: count them where results are compared.

    Args:
        model: As `freeze_base` left it, on its device, in one process.
        path: The output folder, or its manifest.
        batches: What the training would see, in batches of its size: mappings for ``model(**batch)`` with ``labels``,
            or token ids (n, c). Some are read, and repeated if they are few.
        kind: As for `optimizer`.
        budget_tokens: At most so many tokens are computed with. Twice as many make the suggestion surer; 84 steps or
            more are needed.
        loss: Computes the loss of a batch, a scalar; None for ``model(**batch).loss``.
        max_grad_norm: Gradients are clipped to this norm, as transformers' Trainer does.
        lowest, highest: The ends of the ramp.
        **settings: More for `optimizer`: ``output_ratio``, ``weight_decay`` ... A ``zeroed_lr`` stays as it is,
            whatever rate of the others is tried.

    Returns:
        The suggestion and what it rests on.

    Raises:
        CheckpointError, TrainingError: as `optimizer`; the budget is too small; there is no batch, no loss, or several
            processes; or every rate diverged.

    Reference:
        The ramp is the learning rate range test of Smith, Cyclical learning rates for training neural networks,
        arXiv 1506.01186, section 3.3.
    """
    import torch

    check_rates(lowest=lowest, highest=highest, max_grad_norm=max_grad_norm)
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise TrainingError(
            "a search in several processes",
            expected="one process",
            got=torch.distributed.get_world_size(),
            hint="search in one, and pass its suggestion on",
        )
    if "lr" in settings:
        raise TrainingError("the rate that is searched for was given", where="lr", hint="training.optimizer takes it")

    def compute(batch: Any) -> Tensor:
        found = loss(model, batch) if loss is not None else model(**batch).loss
        if found is None:
            raise TrainingError("the model computed no loss", expected="batches with labels", got=sorted(batch))
        return found

    with restored(model) as trained:
        start = [parameter.detach().clone() for parameter in trained]
        read, ramp_steps, run_steps = _plan(batches, budget_tokens, trained[0].device)
        used = 0

        def run(rates: Sequence[float], chosen: Sequence[Any], untrained: Sequence[float]) -> list[float]:
            """The losses before each step, until one is far above the untrained model's."""
            nonlocal used
            torch.manual_seed(0)  # the same dropout in every run
            with torch.no_grad():
                for parameter, value in zip(trained, start, strict=True):
                    parameter.copy_(value)
            steps = optimizer(model, path, lr=rates[0], kind=kind, **settings)
            fixed = settings.get("zeroed_lr") is not None
            searched = [group for group in steps.param_groups if not (fixed and group["name"].startswith("zeroed"))]
            shares = [group["lr"] / rates[0] for group in searched]
            losses: list[float] = []
            for lr, batch, before in zip(rates, chosen, untrained, strict=True):
                loss_now = compute(batch)
                used += _tokens(batch)
                if not loss_now.item() <= before + _RISE:  # or not a number
                    break
                losses.append(loss_now.item())
                for group, share in zip(searched, shares, strict=True):
                    group["lr"] = lr * share
                steps.zero_grad()
                loss_now.backward()
                torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
                steps.step()
            return losses

        with torch.no_grad():
            untrained = [compute(batch).item() for batch in read]
        used += sum(map(_tokens, read))
        if not all(map(math.isfinite, untrained)):
            raise TrainingError("the untrained model's loss is not a number", where=f"{type(model).__name__}, {path}")
        growth = (highest / lowest) ** (1 / (ramp_steps - 1))
        rising = [lowest * growth**i for i in range(ramp_steps)]
        ramp = run(rising, read[:1] * ramp_steps, untrained[:1] * ramp_steps)
        end = rising[max(0, min(range(len(ramp)), key=ramp.__getitem__) - 1)]  # a loss is due to the step before
        rates = [end / _FACTOR**i for i in reversed(range(_RUNS))]

        def late(lr: float, steps: int) -> list[float] | None:
            """The losses of the second half of a run; None if it diverged."""
            losses = run([lr] * steps, read[:steps], untrained[:steps])
            return losses[steps // 2 :] if len(losses) == steps else None

        means = [_mean(late(lr, run_steps)) for lr in rates]
        best = min(range(_RUNS), key=means.__getitem__)
        if math.isinf(means[best]):
            raise TrainingError(
                "every learning rate diverged",
                where=f"{rates[0]:.1e} to {rates[-1]:.1e}",
                hint="try a lower `highest`",
            )
        last = [lr for lr, mean in list(zip(rates, means, strict=True))[max(0, best - 1) : best + 2] if mean < math.inf]
        finals = [late(lr, _LONG * run_steps) for lr in last]
    suggestion, reason = _choose(last, finals)
    if suggestion in (rates[0], rates[-1]):
        reason += "; it is at the end of the rates that were tried, so search again with more tokens"
    return LrSearch(
        kind,
        suggestion,
        tuple(zip(rates, means, strict=True)),
        statistics.fmean(untrained[run_steps // 2 : run_steps]),
        tuple((lr, _mean(losses)) for lr, losses in zip(last, finals, strict=True)),
        tuple(zip(rising, ramp, strict=False)),
        reason,
        used,
        run_steps,
    )


def _plan(batches: Iterable[Any], budget: int, device: Any) -> tuple[list[Any], int, int]:
    """The batches of the longest run, on the device, the steps of the ramp and those of a run: within the budget even
    if all batches were as large as the largest."""
    source = iter(batches)
    read = [_on(device, batch) for batch in itertools.islice(source, 1)]
    if not read:
        raise TrainingError("there is no batch", where="batches", hint="an iterator can be read only once")

    def planned() -> tuple[int, int, int]:
        largest = max(map(_tokens, read))
        steps = budget // largest
        ramp = max(_LEAST_RAMP, steps // 8)
        return largest, ramp, (steps - ramp) // _UNITS

    read += [_on(device, batch) for batch in itertools.islice(source, max(0, _LONG * planned()[2] - 1))]
    largest, ramp_steps, run_steps = planned()
    if run_steps < _LEAST_RUN:
        least = _LEAST_RAMP + _UNITS * _LEAST_RUN
        raise TrainingError(
            "the budget is too small",
            where="budget_tokens",
            expected=f"{least * largest:,}: {plural(least, 'step')} of {largest:,} tokens",
            got=f"{budget:,}",
            hint="smaller batches need less, but have a lower best rate",
        )
    return list(itertools.islice(itertools.cycle(read), _LONG * run_steps)), ramp_steps, run_steps


def _choose(rates: Sequence[float], late: Sequence[Sequence[float] | None]) -> tuple[float, str]:
    """The rate of the lowest loss, or the next lower one if it is as good, or about to be better.

    Args:
        rates: Of the last runs, rising.
        late: The losses of the second half of each, step by step; None where it diverged.

    Returns:
        The rate, and why.

    Raises:
        TrainingError: all diverged.
    """
    means = [_mean(losses) for losses in late]
    best = min(range(len(rates)), key=means.__getitem__)
    lower, lowest = late[best - 1] if best else None, late[best]
    if lowest is None:
        raise TrainingError(
            "the best learning rates of short runs diverge in long ones", got=rates, hint="larger batches"
        )
    if lower is not None:
        above = [a - b for a, b in zip(lower, lowest, strict=True)]
        if statistics.fmean(above) <= statistics.stdev(above) / math.sqrt(len(above)):
            return rates[best - 1], f"its loss is not surely above that of {rates[best]:.2e}, the lowest"
        slope, now = statistics.linear_regression(range(-len(above) + 1, 1), above)
        if now + slope * 2 * len(above) <= 0:  # a whole run later
            return rates[best - 1], f"it gains on {rates[best]:.2e}, which has the lowest loss so far"
    return rates[best], "the lowest loss"


def _mean(losses: Sequence[float] | None) -> float:
    return math.inf if losses is None else statistics.fmean(losses)


def _on(device: Any, batch: Any) -> Any:
    if hasattr(batch, "to") and not isinstance(batch, Mapping):
        batch = {"input_ids": batch, "labels": batch}
    if isinstance(batch, Mapping):
        return {name: x.to(device) if hasattr(x, "to") else x for name, x in batch.items()}
    raise TrainingError(
        "not a batch", where="batches", expected="a mapping, or token ids (n, c)", got=type(batch).__name__
    )


def _tokens(batch: Mapping[str, Any]) -> int:
    for name in ("input_ids", "labels"):
        if name in batch:
            return batch[name].numel()
    raise TrainingError("a batch without tokens", where="batches", expected="input_ids or labels", got=sorted(batch))
