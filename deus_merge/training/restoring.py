"""Training that leaves a model, and the random number generators, as they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..core.errors import TrainingError

if TYPE_CHECKING:
    from torch.nn import Module, Parameter


@contextlib.contextmanager
def restored(model: Module) -> Iterator[list[Parameter]]:
    """A context in which a model may be trained: at its end weights, buffers, gradients, the modes of all modules and
    the random number generators of torch, numpy and Python are as they were.

    Args:
        model: The model, which is in training mode within.

    Yields:
        The parameters that train, without gradients.

    Raises:
        TrainingError: none trains.
    """
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
