"""New layers that a small network predicts from their neighbours, once it has learned from all layers of the model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..core.errors import CheckpointError
from ..core.parameters import block_parameter, parse_roles
from ..core.tensors import Diagnostics, OutputChunk
from ._predictor import BATCH, Training, learn, predict
from ._stacked import decompose, decomposing_memory, group_size
from .base import COMPUTE, ZEROS, Block, MergeMethod, OutputTensor, Refusal, undescribed
from .ot_fuse import check_zero_init, is_zeroed

if TYPE_CHECKING:
    import torch

_MINIMUM_LAYERS = 3  # one between two others


@dataclass(frozen=True, kw_only=True)
class PredictorDiagnostics(Diagnostics):
    """How the network of one role learned.

    Attributes:
        rank: Rank of the stacked weights.
        effective_rank: The exponential of the entropy of their singular values.
        seconds: Wall time of the decomposition and of learning.
        steps: Steps of the optimiser; ``train_loss`` is the mean of the last epoch.
        held_out_error: Relative error on directions that were not learned from; None when there were none.
        held_out_error_of_average: The same of the mean of the two neighbours.
    """

    rank: int
    effective_rank: float
    seconds: float
    steps: int
    train_loss: float
    held_out_error: float | None = None
    held_out_error_of_average: float | None = None


class Lesa(MergeMethod):
    name = "lesa"
    summary = "new layers predicted from their neighbours by a network that learned from all layers of the model"
    reference = "Yang et al., LESA: Learnable LLM Layer Scaling-Up, arXiv 2502.13794"
    inserts = True
    learns = True
    parameters = (
        block_parameter("epochs", "integer", 5, "how often the network sees every sample", minimum=1),
        block_parameter("width", "integer", 256, "of the network's two hidden layers", minimum=1),
        block_parameter("learning_rate", "number", 1e-3, "of AdamW", minimum=0),
        block_parameter("norm_weight", "number", 5e-5, "share of the loss that holds the norm of predictions",
               minimum=0, maximum=1),
        block_parameter("zero_init", "other", False, "zero the tensors that write to the residual stream, or only these"
               " roles", parse=parse_roles),
        block_parameter("compute_dtype", "choice", "float32", "of the arithmetic", choices=("float32", "float64")),
    )  # fmt: skip

    def check(self, outputs, sources):
        if unknown := [o.role for o in outputs if o.spec is None]:
            return undescribed(self.name, unknown[0])
        if sources < _MINIMUM_LAYERS:
            return Refusal(
                f"lesa learns from layers between two others: it needs {_MINIMUM_LAYERS} layers with the"
                f" same tensors, the model has {sources}"
            )
        return check_zero_init(outputs)

    def decide(self, output):
        writes = output.spec is not None and output.spec.writes_residual
        return ZEROS if writes and is_zeroed(output) else COMPUTE

    def merge(self, block):
        """Weights are predicted; norms and biases are the mean of the neighbours'."""
        if len(block.outputs[0].shape) == 2:
            yield from self._predict(block, block.outputs)
            return
        for output in block.outputs:
            below, above = (_read(block, layer) for layer in _neighbours(output))
            yield OutputChunk(output.role, (below + above) / 2, output.slot)

    def _predict(self, block: Block, outputs: Sequence[OutputTensor]) -> Iterator[OutputChunk]:
        started, read = time.monotonic(), partial(_read, block)
        role, p = outputs[0].role, outputs[0].parameters
        training = Training(p["epochs"], p["width"], p["learning_rate"], p["norm_weight"])
        hold = block.memory is None or block.memory >= self.workspace(outputs)
        stacked = decompose(read, len(outputs[0].source_parameters))
        if not stacked.rank:  # nothing but zeros
            yield from (OutputChunk(role, read(_neighbours(o)[0]).clone(), o.slot) for o in outputs)
            return
        network, progress = learn(stacked, training, block.generator(outputs[0], 0), hold)
        diagnostics = PredictorDiagnostics(
            role=role,
            rank=stacked.rank,
            effective_rank=stacked.effective_rank(),
            seconds=time.monotonic() - started,
            steps=int(progress["steps"]),
            train_loss=progress["train_loss"],
            held_out_error=progress.get("held_out_error"),
            held_out_error_of_average=progress.get("held_out_error_of_average"),
        )
        yield OutputChunk(role, None, diagnostics=diagnostics)
        for output in outputs:
            yield OutputChunk(role, predict(stacked, network, *_neighbours(output)), output.slot)

    def workspace(self, outputs):
        return max(_memory(o, hold=True) for o in outputs)

    def minimum_workspace(self, outputs):
        return max(_memory(o, hold=False) for o in outputs)


def _read(block: Block, layer: int) -> torch.Tensor:
    """The tensor of the block's role in one layer, in the arithmetic's dtype."""
    import torch

    role, p = block.outputs[0].role, block.outputs[0].parameters
    tensor = block.read(role, layer).to(getattr(torch, p["compute_dtype"]))
    if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        raise CheckpointError(f"layer {layer} holds NaN or infinity", where=role, expected="finite weights")
    return tensor


def _neighbours(output: OutputTensor) -> tuple[int, int]:
    """The sources below and above a new layer."""
    assert output.between is not None
    return output.between


def _memory(output: OutputTensor, hold: bool) -> int:
    """Bytes alive at once while a role's new tensors are computed."""
    width = 8 if output.parameters["compute_dtype"] == "float64" else 4
    if len(output.shape) < 2:
        return 6 * width * math.prod(output.shape)
    (n, m), layers, hidden = output.shape, len(output.source_parameters), output.parameters["width"]
    group = min(n, group_size(layers, m))
    basis = n * n + 2 * group * n
    network = 3 * m * hidden + hidden**2 + 2 * hidden + m
    learning = n * m + layers * m * (n if hold else group) + 5 * network + BATCH * (8 * m + 6 * hidden)
    predicting = 4 * n * m + group * (5 * m + 2 * hidden) + network
    return max(decomposing_memory(n) + width * n * m, width * (basis + max(learning, predicting)))


METHOD = Lesa()
