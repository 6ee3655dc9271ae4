"""Training the new layers of an output: which parameters are new, freezing the others, and checking that they stay.

::

    from deus_merge import training

    prepared = training.prepare("deeper")  # frozen base in bfloat16, new layers in float32, autocast, checkpointing
    print(prepared)
    model, tokenizer = prepared
    lr = training.find_lr(model, "deeper", batches).suggestion
    optimizer = training.optimizer(model, "deeper", lr=lr)
    trainer = transformers.Trainer(model=model, ..., optimizers=(optimizer, None))
    training.watch(trainer, "deeper")                 # checks the frozen weights, logs the new layers
    trainer.train()
    training.save_trained(model, "deeper", "trained")  # the base keeps its bytes; it can be stripped, and grown again

A model that you load yourself is frozen by `freeze_base`. Where a trainer saves the model itself, `carry_manifest`
copies the manifest to its folder. In your own training loop, use `Watch`. Only `NewLayersCallback` and `watch` need
transformers when they are imported, which is when one of them is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .carry import carry_manifest
from .freeze import Trainable, freeze_base, new_parameters, optimizer_groups
from .lr_search import LrSearch, find_lr
from .optimizers import optimizer
from .prepared import Prepared, prepare
from .saving import save_trained
from .watching import Watch

if TYPE_CHECKING:
    from .callback import NewLayersCallback, watch

__all__ = [
    "LrSearch",
    "NewLayersCallback",
    "Prepared",
    "Trainable",
    "Watch",
    "carry_manifest",
    "find_lr",
    "freeze_base",
    "new_parameters",
    "optimizer",
    "optimizer_groups",
    "prepare",
    "save_trained",
    "watch",
]


def __getattr__(name: str):
    if name in ("NewLayersCallback", "watch"):
        from . import callback

        return getattr(callback, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
