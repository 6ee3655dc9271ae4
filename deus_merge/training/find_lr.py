"""A short search for the learning rate of new layers, which leaves the model as it was."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import TrainingError
from .optimizers import check_rates, optimizer

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter

_FACTOR = 3.0  # between the rates of two runs
_RUNS = 5  # the highest at the rate that the ramp ends with
_LEAST_RAMP, _LEAST_RUN = 24, 8  # steps
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
        ramp: (learning rate, loss) of each step of the ramp.
        reason: How the suggestion was chosen.
        tokens: The number of tokens that the search computed with.
        steps: The number of steps of each run.
    """

    kind: str
    suggestion: float
    curve: tuple[tuple[float, float], ...]
    untrained: float
    ramp: tuple[tuple[float, float], ...]
    reason: str
    tokens: int
    steps: int

    def __str__(self) -> str:
        finite = [loss for _, loss in self.curve if math.isfinite(loss)]
        low, high = min(finite), max(finite)
        lines = [f"{self.kind}, {self.steps} steps a run, {self.tokens:,} tokens in all", "learning rate  loss"]
        lines.append(f"{'untrained':<13}  {self.untrained:.4f}")
        for lr, loss in self.curve:
            if math.isfinite(loss):
                bar = "#" * (1 + round(30 * (loss - low) / (high - low or 1.0)))
                value = f"{loss:.4f}  {bar}"
            else:
                value = "diverged"
            lines.append(f"{lr:<13.2e}  {value}{'  <- suggested' if lr == self.suggestion else ''}")
        return "\n".join([*lines, f"{self.suggestion:.2e}: {self.reason}"])


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

    A sixth of the budget goes into a ramp: the rate rises from ``lowest`` to ``highest`` on one batch until the loss
    does. Five rates up to that of its lowest loss, each three times the one before, train on the same batches for
    equally many steps; the untrained model's losses on these say which diverge. The rate of the lowest loss is
    suggested, or the next lower one if its loss is within one standard error (over batches, of the difference): short
    runs favour high rates, and long ones fail by them.

    Weights, buffers, gradients, random number generators and the mode of every module are as before when it returns
    or fails. Tokens that a search used have been seen: count them where results are compared.

    Args:
        model: As `freeze_base` left it, on its device, in one process.
        path: The output folder, or its manifest.
        batches: What the training would see, in batches of its size: mappings for ``model(**batch)`` with ``labels``,
            or token ids (n, c). Some are read, and repeated if they are few.
        kind: As for `optimizer`.
        budget_tokens: At most so many tokens are computed with. Twice as many make the suggestion surer; 72 steps or
            more are needed.
        loss: Computes the loss of a batch, a scalar; None for ``model(**batch).loss``.
        max_grad_norm: Gradients are clipped to this norm, as transformers' Trainer does.
        lowest, highest: The ends of the ramp.
        **settings: More for `optimizer`: ``output_ratio``, ``weight_decay`` ...

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
    if "lr" in settings or "zeroed_lr" in settings:
        raise TrainingError("a rate that is searched for was given", where="lr, zeroed_lr", hint="use output_ratio")

    def compute(batch: Any) -> Tensor:
        found = loss(model, batch) if loss is not None else model(**batch).loss
        if found is None:
            raise TrainingError("the model computed no loss", expected="batches with labels", got=sorted(batch))
        return found

    with _restored(model) as trained:
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
            shares = [group["lr"] / rates[0] for group in steps.param_groups]
            losses: list[float] = []
            for lr, batch, before in zip(rates, chosen, untrained, strict=True):
                loss_now = compute(batch)
                used += _tokens(batch)
                if not loss_now.item() <= before + _RISE:  # or not a number
                    break
                losses.append(loss_now.item())
                for group, share in zip(steps.param_groups, shares, strict=True):
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
        losses = [run([lr] * run_steps, read, untrained) for lr in rates]
    late = [each[run_steps // 2 :] if len(each) == run_steps else None for each in losses]
    pick, reason = _choose(rates, late)
    curve = tuple(
        (lr, math.inf if each is None else statistics.fmean(each)) for lr, each in zip(rates, late, strict=True)
    )
    at_start = statistics.fmean(untrained[run_steps // 2 :])
    shown = tuple(zip(rising, ramp, strict=False))
    return LrSearch(kind, rates[pick], curve, at_start, shown, reason, used, run_steps)


def _plan(batches: Iterable[Any], budget: int, device: Any) -> tuple[list[Any], int, int]:
    """The batches of a run, on the device, the steps of the ramp and the steps of a run: within the budget even if all
    batches were as large as the largest."""
    source = iter(batches)
    read = [_on(device, batch) for batch in itertools.islice(source, 1)]
    if not read:
        raise TrainingError("there is no batch", where="batches", hint="an iterator can be read only once")

    def planned() -> tuple[int, int, int]:
        largest = max(map(_tokens, read))
        steps = budget // largest
        ramp = max(_LEAST_RAMP, steps // 6)
        return largest, ramp, (steps - ramp) // (_RUNS + 1)

    read += [_on(device, batch) for batch in itertools.islice(source, max(0, planned()[2] - 1))]
    largest, ramp_steps, run_steps = planned()
    if run_steps < _LEAST_RUN:
        least = _LEAST_RAMP + (_RUNS + 1) * _LEAST_RUN
        raise TrainingError(
            "the budget is too small",
            where="budget_tokens",
            expected=f"{least * largest:,}: {least} steps of {largest:,} tokens",
            got=f"{budget:,}",
            hint="smaller batches need less, but have a lower best rate",
        )
    return list(itertools.islice(itertools.cycle(read), run_steps)), ramp_steps, run_steps


def _choose(rates: Sequence[float], late: Sequence[Sequence[float] | None]) -> tuple[int, str]:
    """The rate of the lowest loss, or the next lower one if these batches cannot tell the two apart.

    Args:
        rates: Of the runs, rising.
        late: The losses of the second half of each run; None where it diverged.

    Returns:
        Its index, and why.
    """
    means = [math.inf if each is None else statistics.fmean(each) for each in late]
    best = min(range(len(rates)), key=means.__getitem__)
    of_best = late[best]
    if of_best is None:
        raise TrainingError(
            "every learning rate diverged",
            where=f"{rates[0]:.1e} to {rates[-1]:.1e}",
            hint="try a lower `highest`, and see that the loss of the untrained model is what it should be",
        )

    def as_good(each: Sequence[float] | None) -> bool:
        differences = [a - b for a, b in zip(each or (), of_best, strict=each is not None)]
        return bool(differences) and statistics.fmean(differences) <= _error(differences)

    pick = best - 1 if best and as_good(late[best - 1]) else best
    reason = f"the lowest loss of {len(rates)} runs"
    if pick != best:
        reason = f"its loss is not surely above that of {rates[best]:.2e}, the lowest of {len(rates)} runs"
    if pick in (0, len(rates) - 1):
        reason += "; it is at the end of the rates that were tried, so search again with more tokens"
    return pick, reason


def _error(values: Sequence[float]) -> float:
    """The standard error of their mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


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


@contextlib.contextmanager
def _restored(model: Module) -> Iterator[list[Parameter]]:
    """The parameters that train, in training mode; at the end the model and the random number generators are as they
    were."""
    import numpy as np
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise TrainingError("no parameter of this model trains", hint="call freeze_base first")
    tensors = [*trained, *model.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    gradients = [parameter.grad for parameter in trained]
    modes = [(module, module.training) for module in model.modules()]
    others = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            for parameter in trained:
                parameter.grad = None
            model.train()
            yield trained
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
        random.setstate(others[0])
        np.random.set_state(others[1])
