"""New layers that a small network predicts from their neighbours, once it has learned from all layers of the model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..core.errors import CheckpointError
from ..core.parameters import Parameter, parse_roles
from ._predictor import BATCH, Training, learn, predict
from ._stacked import decompose, decomposing_memory, group_size
from .base import Block, Compute, Made, MergeMethod, TensorTask, Zeros
from .ot_fuse import is_zeroed, zero_problem

if TYPE_CHECKING:
    import torch

_LEAST = 3  # layers: one between two others


def _block(name: str, kind: str, default: object, help: str, **more) -> Parameter:
    return Parameter(name, kind, default, help, "block", **more)


class Lesa(MergeMethod):
    name = "lesa"
    summary = "new layers predicted from their neighbours by a network that learned from all layers of the model"
    reference = "Yang et al., LESA: Learnable LLM Layer Scaling-Up, arXiv 2502.13794"
    inserts = True
    learns = True
    parameters = (
        _block("epochs", "integer", 5, "how often the network sees every sample", minimum=1),
        _block("width", "integer", 256, "of the network's two hidden layers", minimum=1),
        _block("learning_rate", "number", 1e-3, "of AdamW", minimum=0),
        _block("norm_weight", "number", 5e-5, "share of the loss that holds the norm of predictions", minimum=0,
               maximum=1),
        _block("zero_init", "other", False, "zero the tensors that write to the residual stream, or only these roles",
               parse=parse_roles),
        _block("compute_dtype", "choice", "float32", "of the arithmetic", choices=("float32", "float64")),
    )  # fmt: skip

    def check(self, tasks, sources):
        if unknown := [t.role for t in tasks if t.spec is None]:
            return (
                f"lesa does not know what {unknown[0]!r} does in a layer. Describe the family in architectures/, or"
                " use passthrough, linear or slerp"
            )
        if sources < _LEAST:
            return f"lesa learns from layers between two others: it needs {_LEAST} layers, the model has {sources}"
        return zero_problem(tasks)

    def origin(self, task):
        return Zeros() if task.spec.writes_residual and is_zeroed(task) else Compute()

    def merge(self, block):
        """Role by role: weights are predicted; norms and biases are the mean of the neighbours'."""
        roles: dict[str, list[TensorTask]] = {}
        for task in block.tasks:
            if isinstance(self.origin(task), Compute):
                roles.setdefault(task.role, []).append(task)
        for role, tasks in roles.items():
            read = partial(_read, block, role)
            if len(tasks[0].shape) == 2:
                yield from self._predicted(block, tasks, read)
            else:
                for task in tasks:
                    below, above = map(read, task.between)
                    yield Made(task, (below + above) / 2)

    def _predicted(self, block: Block, tasks: Sequence[TensorTask], read) -> Iterator[Made]:
        started = time.monotonic()
        p = tasks[0].parameters
        training = Training(p["epochs"], p["width"], p["learning_rate"], p["norm_weight"])
        hold = block.memory is None or block.memory >= self.workspace(tasks)
        stacked = decompose(read, len(tasks[0].source_parameters))
        if not stacked.rank:  # nothing but zeros
            yield from (Made(task, read(task.between[0]).clone()) for task in tasks)
            return
        network, told = learn(stacked, training, block.generator(tasks[0], 0), hold)
        told = {"role": tasks[0].role, "rank": stacked.rank, "effective_rank": stacked.effective_rank(), **told}
        yield Made(tasks[0], None, {**told, "seconds": time.monotonic() - started})
        for task in tasks:
            yield Made(task, predict(stacked, network, *task.between))

    def workspace(self, tasks):
        return max(_memory(t, hold=True) for t in tasks)

    def least_workspace(self, tasks):
        return max(_memory(t, hold=False) for t in tasks)


def _read(block: Block, role: str, layer: int) -> torch.Tensor:
    """A role's tensor in one layer, in the arithmetic's dtype."""
    import torch

    p = next(t for t in block.tasks if t.role == role).parameters
    tensor = block.read(role, layer).to(getattr(torch, p["compute_dtype"]))
    if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        raise CheckpointError(f"layer {layer} holds NaN or infinity", where=role, expected="finite weights")
    return tensor


def _memory(task: TensorTask, hold: bool) -> int:
    """Bytes alive at once while a role's new tensors are made."""
    width = 8 if task.parameters["compute_dtype"] == "float64" else 4
    if len(task.shape) < 2:
        return 6 * width * task.shape[0]
    (n, m), layers, hidden = task.shape, len(task.source_parameters), task.parameters["width"]
    group = min(n, group_size(layers, m))
    basis = n * n + 2 * group * n
    network = 3 * m * hidden + hidden**2 + 2 * hidden + m
    learning = n * m + layers * m * (n if hold else group) + 5 * network + BATCH * (8 * m + 6 * hidden)
    predicting = 4 * n * m + group * (5 * m + 2 * hidden) + network
    return max(decomposing_memory(n) + width * n * m, width * (basis + max(learning, predicting)))


METHOD = Lesa()
