"""Reading and writing checkpoints: lazily read safetensors folders, and outputs that survive an interrupted run."""

from __future__ import annotations

from ..core.tensors import StoredTensor
from .hub import resolve
from .layout import ShardLayout, TensorEntry, index_json, plan_shards
from .output_folder import OutputFolder
from .reader import Checkpoint
from .shards import ShardWriter
from .storage import LoadOptions, open_source
from .system import free_space

__all__ = [
    "LoadOptions",
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
