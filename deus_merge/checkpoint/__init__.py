"""Checkpoints in and out: safetensors folders read lazily, written at known offsets, resumed after a kill."""

from __future__ import annotations

from ..core.tensors import StoredTensor
from .hub import resolve
from .layout import ShardLayout, TensorEntry, index_json, plan_shards
from .output_folder import OutputFolder
from .reader import Checkpoint
from .shards import ShardWriter
from .storage import Access, open_source
from .system import free_space

__all__ = [
    "Access",
    "Checkpoint",
    "OutputFolder",
    "ShardLayout",
    "ShardWriter",
    "TensorEntry",
    "StoredTensor",
    "free_space",
    "index_json",
    "open_source",
    "plan_shards",
    "resolve",
]
