"""A model whose head is tied to its embeddings, read as one whose head is a tensor of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..core.tensors import StoredTensor
from .tensor_source import FileStamp, TensorSource

if TYPE_CHECKING:
    import torch

_KEY = "tie_word_embeddings"


class UntiedSource:
    """A model (`TensorSource`) with a head of its own, which is the embeddings. Pickles.

    Args:
        base: The model.
        head: The name of the head.
        embeddings: The name of the tensor that is the head.
    """

    def __init__(self, base: TensorSource, head: str, embeddings: str):
        self.where, self.folders, self.files = base.where, base.folders, base.files
        self.side_files, self.provenance, self.fingerprint = base.side_files, base.provenance, base.fingerprint
        self.config = tie(base.config, False)
        self.tensors: Mapping[str, StoredTensor] = {**base.tensors, head: replace(base.tensors[embeddings], name=head)}
        self.base, self._head, self._embeddings = base, head, embeddings

    def read(self, name: str) -> torch.Tensor:
        return self.base.read(self._stored(name))

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.base.slice(self._stored(name), start, stop)

    def prefetch(self, names: Iterable[str]) -> None:
        self.base.prefetch([self._stored(name) for name in names])

    def stamp(self) -> list[FileStamp]:
        return self.base.stamp()

    def root(self, name: str) -> tuple[TensorSource, str]:
        return self.base.root(self._stored(name))

    def bound(self, results: Mapping[str, TensorSource]) -> UntiedSource:
        return UntiedSource(self.base.bound(results), self._head, self._embeddings)

    def workspace(self, name: str, minimum: bool = False) -> int:
        return self.base.workspace(self._stored(name), minimum)

    def _stored(self, name: str) -> str:
        return self._embeddings if name == self._head else name


def tie(config: Mapping, tied: bool) -> dict:
    """A copy of a config.json that says that the head is tied to the embeddings, or that it is not."""
    parts = {
        key: tie(value, tied)
        for key, value in config.items()
        if key.endswith("text_config") and isinstance(value, Mapping) and _KEY in value
    }
    return {**config, **parts, _KEY: tied}


def says_tied(config: Mapping) -> bool | None:
    """Whether a config.json says that the head is tied to the embeddings; None where it says nothing."""
    texts = (value for key, value in config.items() if key.endswith("text_config") and isinstance(value, Mapping))
    found = (part.get(_KEY) for part in (config, *texts))
    return next((value for value in found if isinstance(value, bool)), None)
