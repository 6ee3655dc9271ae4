"""Folders and GGUF files of this machine, and models of the hub that are copied to it."""

from __future__ import annotations

from ...core.urls import is_url
from ..dequantized import dequantized
from ..gguf import GgufSource, is_gguf
from ..hub import is_local, resolve
from ..pickled import PickledCheckpoint, has_safetensors
from ..reader import Checkpoint
from ..tensor_source import TensorSource
from .base import LoadOptions


class Local:
    """The storage ``local``."""

    summary = "a folder or GGUF file of this machine, or a model of the hub that is copied to it first"
    example = "./model or org/name[@revision]"

    def takes(self, ref: str, options: LoadOptions) -> bool:
        return not is_url(ref) and (not options.stream or is_local(ref))

    def open(self, ref: str, options: LoadOptions) -> TensorSource:
        if is_gguf(ref):
            return GgufSource.open(ref)
        folder = resolve(ref, cache_dir=options.cache_dir, pickle=options.allow_pickle)
        pickled = options.allow_pickle and not has_safetensors(folder)
        return dequantized((PickledCheckpoint if pickled else Checkpoint).open(folder))

    def sink(self, ref: str) -> None:
        return None


STORAGE = Local()
