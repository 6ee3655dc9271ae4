"""The way into training: which parameters are new, how the rest stays frozen, and how one sees that it did.

::

    from deus_merge import training

    model = transformers.AutoModelForCausalLM.from_pretrained("deeper", dtype=torch.float32)
    print(training.freeze_base(model, "deeper"))
    trainer = transformers.Trainer(model=model, ...)
    training.watch(trainer, "deeper")                 # checks the frozen weights, logs the new layers
    trainer.train()
    model.to(torch.bfloat16).save_pretrained("trained")  # as it was stored: the base keeps its bytes
    training.carry_manifest("deeper", "trained")      # so that it can be stripped, verified and grown again

In a loop of one's own `Watch` does what the callback does. Only `NewLayersCallback` and `watch` need transformers, and
import it when they are first asked for.
"""

from __future__ import annotations

from .carry import carry_manifest
from .freeze import Trainable, freeze_base, new_parameters, optimizer_groups
from .watching import Watch

__all__ = [
    "NewLayersCallback",
    "Trainable",
    "Watch",
    "carry_manifest",
    "freeze_base",
    "new_parameters",
    "optimizer_groups",
    "watch",
]


def __getattr__(name: str):
    if name in ("NewLayersCallback", "watch"):
        from . import callback

        return getattr(callback, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
