"""One new layer: its statistics, its weights, and the size of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ...core.errors import TrainingError
from ...core.units import torch_dtype
from ...report.manifest_parts import CalibratedLayer
from .fit import Statistics
from .layer_runner import LayerRunner
from .memory import CANDIDATES
from .options import CalibrationOptions
from .passes import Passes
from .writers import Writer

if TYPE_CHECKING:
    from torch import Tensor

#: root mean square of what a layer adds, as a share of the median norm of the hidden states: tried first, ...
COARSE = tuple(4.0 ** (i - CANDIDATES + 1) for i in range(CANDIDATES))  # 6e-5 to 1
#: ... and then these multiples of the best of them
FINE = (0.5, 0.5**0.5, 2**0.5, 2.0)


@dataclass(frozen=True)
class Step:
    """The outcome for one layer.

    Attributes:
        layer: The record of the manifest.
        weights: The new values by tensor name, in the dtype of the file; empty where the layer stays zero.
        set_weights: Puts them into the layer, which is in memory.
    """

    layer: CalibratedLayer
    weights: Mapping[str, Tensor]
    set_weights: Callable[[], None]


def calibrate_layer(
    passes: Passes, writers: Sequence[Writer], before: float | None, options: CalibrationOptions
) -> Step:
    """Calibrate the layer at the position of the passes.

    Args:
        passes: Their hidden states are in front of the layer, which is the identity.
        writers: The layer's writers.
        before: The loss of the windows that are held out; None where it is not known yet.
        options: Method and damping.

    Returns:
        The layer's record and weights.

    Raises:
        TrainingError: the statistics or the loss are not finite.
    """
    index, runner = passes.position, passes.runner
    statistics = layer_statistics(passes, writers, with_gradients=options.method == "kfac")
    statistics.check(index)
    scale = statistics.scale
    weights, size = statistics.solve(options.method, options.damping, index)  # (d, m)
    del statistics
    weights = weights.float() if runner.dtype.itemsize <= 4 else weights

    def losses(alphas: Sequence[float]) -> list[float]:
        return passes.held_out_losses(partial(set_weights, runner, writers, weights, alpha) for alpha in alphas)

    unit = scale / size if size > 0 else 0.0  # the alpha whose outputs are as large as the hidden states
    tried = {0.0: before} if before is not None else {0.0: losses([0.0])[0]}
    if not _finite(tried[0.0]):
        raise TrainingError(f"layer {index}: the loss is not finite", where=f"layer {index}", got=tried[0.0])
    start = tried[0.0]
    if unit:
        alphas = [unit * share for share in COARSE]
        tried |= zip(alphas, losses(alphas), strict=True)
        if best := _best(tried):
            alphas = [best * factor for factor in FINE]
            tried |= zip(alphas, losses(alphas), strict=True)
    best = _best(tried)
    values = {w.tensor: v for w, v in _scaled(writers, weights, best)} if best else {}
    record = CalibratedLayer(layer=index, tensors=tuple(values), alpha=best, loss_before=start, loss_after=tried[best])
    return Step(record, values, partial(set_weights, runner, writers, weights, best))


def set_weights(runner: LayerRunner, writers: Sequence[Writer], weights: Tensor, alpha: float) -> None:
    """Put the weights of a step into a layer, which is in memory: as they are after rounding to the file's dtype.

    Args:
        runner: The model.
        writers: The layer's writers.
        weights: Those of step size 1 for all writers, (d, m).
        alpha: The step size.
    """
    import torch

    for writer, values in _scaled(writers, weights, alpha):
        module = writer.module(runner)
        value = values.to(module.weight.device, module.weight.dtype)
        module.weight = torch.nn.Parameter(value, requires_grad=False)  # (d, columns)


def _scaled(writers: Sequence[Writer], weights: Tensor, alpha: float) -> Iterator[tuple[Writer, Tensor]]:
    """Each writer's values in the dtype of its tensor."""
    at = 0
    for writer in writers:
        part = weights[:, at : at + writer.columns]  # (d, columns)
        yield writer, (alpha * part).to(torch_dtype(writer.dtype)).contiguous()
        at += writer.columns


def _best(tried: Mapping[float, float]) -> float:
    """The step size of the smallest loss; of equal ones the smallest. One that is not finite is never chosen."""
    return min((alpha for alpha in tried if _finite(tried[alpha])), key=lambda alpha: (tried[alpha], alpha))


def _finite(value: float) -> bool:
    return value - value == 0


def layer_statistics(passes: Passes, writers: Sequence[Writer], *, with_gradients: bool) -> Statistics:
    """The statistics of the layer at the position, which is the identity, over the fitted windows.

    Args:
        passes: The windows.
        writers: The layer's writers.
        with_gradients: Whether the gradients' own covariance is needed.
    """
    import torch

    runner, index = passes.runner, passes.position
    with passes.gradients() as (gradients, _):
        columns = sum(writer.columns for writer in writers)
        device = gradients.read(0, 1).device
        found = Statistics(columns, runner.width, with_gradients=with_gradients, device=device)
        with runner.layers[index].held(), torch.no_grad(), read_by(runner, writers) as read:
            for start, stop in passes.fitted:
                hidden, g = passes.kept(start, stop), gradients.read(start, stop)  # (b, t, d)
                add_batch(found, runner, index, hidden, g, read)
    return found


def add_batch(
    found: Statistics, runner: LayerRunner, index: int, hidden: Tensor, gradients: Tensor, read: dict[str, Tensor]
) -> None:
    """Add a batch of windows to the statistics of a layer, which is in memory.

    Args:
        found: The statistics.
        runner: The model.
        index: The layer.
        hidden: The hidden states in front of it, (b, t, d).
        gradients: Of the loss with respect to those behind it, (b, t, d).
        read: As `read_by` yields it.
    """
    import torch

    runner.layer(index, hidden)
    phi = torch.cat([part.flatten(0, -2) for part in read.values()], dim=1)  # (b t, m)
    found.add(phi, -gradients.flatten(0, 1), hidden.flatten(0, 1))


@contextmanager
def read_by(runner: LayerRunner, writers: Sequence[Writer]) -> Iterator[dict[str, Tensor]]:
    """What each writer read last, by the name of its tensor, in the order of the writers."""
    import torch

    read = {writer.tensor: torch.empty(0) for writer in writers}

    def keep(name: str, _module: object, arguments: tuple) -> None:
        read[name] = arguments[0]

    hooks = [w.module(runner).register_forward_pre_hook(partial(keep, w.tensor)) for w in writers]
    try:
        yield read
    finally:
        for hook in hooks:
            hook.remove()
