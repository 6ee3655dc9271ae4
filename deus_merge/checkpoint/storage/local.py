"""Opens a model reference as a tensor source, whatever files its weights are in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .dequantized import dequantized
from .gguf import GgufSource, is_gguf
from .hub import resolve
from .pickled import PickledCheckpoint, has_safetensors
from .reader import Checkpoint
from .tensor_source import TensorSource


@dataclass(frozen=True)
class LoadOptions:
    """How models are found and read.

    Attributes:
        allow_pickle: Also read pickled weights, of a model that has no safetensors.
        cache_dir: The hub's cache; None for the default of huggingface_hub.
    """

    allow_pickle: bool = False
    cache_dir: Path | None = None


def open_source(ref: str, options: LoadOptions) -> TensorSource:
    """Find a model's folder (on the hub if need be) and read its config and headers. Quantised weights are float
    tensors, see `dequantized.DequantizedSource`.

    Args:
        ref: A folder, ``org/name[@revision]`` on the hub, or a GGUF file.
        options: How it is found and read.

    Raises:
        CheckpointError: as `resolve`, `Checkpoint.open` and `GgufSource.open`.
    """
    if is_gguf(ref):
        return GgufSource.open(ref)
    folder = resolve(ref, cache_dir=options.cache_dir, pickle=options.allow_pickle)
    pickled = options.allow_pickle and not has_safetensors(folder)
    return dequantized((PickledCheckpoint if pickled else Checkpoint).open(folder))
