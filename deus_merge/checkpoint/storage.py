"""A model reference -> its tensors, from whatever kind of files it is allowed to read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .hub import resolve
from .pickled import PickledCheckpoint, has_safetensors
from .reader import Checkpoint, TensorSource


@dataclass(frozen=True)
class Access:
    """What may be read of a model, and where downloads are kept.

    Attributes:
        pickle: Also weights that are pickled, where a model has no safetensors.
        cache_dir: The hub's cache; None for where huggingface_hub keeps it.
    """

    pickle: bool = False
    cache_dir: Path | None = None


#: nothing but safetensors
PLAIN = Access()


def open_source(ref: str, access: Access) -> TensorSource:
    """Find a model's folder (on the hub if need be) and read its config and headers.

    Raises:
        CheckpointError: as `resolve` and `Checkpoint.open`.
    """
    folder = resolve(ref, cache_dir=access.cache_dir, pickle=access.pickle)
    pickled = access.pickle and not has_safetensors(folder)
    return (PickledCheckpoint if pickled else Checkpoint).open(folder)
