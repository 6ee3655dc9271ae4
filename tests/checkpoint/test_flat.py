"""A derived tensor as a vector whose rows are computed when they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deus_merge.checkpoint.flat import FlatRows
from deus_merge.core.tensors import StoredTensor


@pytest.mark.parametrize("run", [3, 8, 11, 100])
def test_rows_longer_than_runs_are_read_once(run: int):
    values = torch.arange(60.0).view(5, 4, 3)
    read: list[int] = []

    def rows(start: int, stop: int) -> torch.Tensor:
        read.extend(range(start, stop))
        return values[start:stop]

    flat = FlatRows(rows, StoredTensor("x", "F32", (5, 4, 3), Path(), 0, 240, derived=True))
    for _ in range(2):  # methods read a tensor in several passes
        read.clear()
        found = [flat[at : min(at + run, 60)] for at in range(0, 60, run)]
        assert torch.equal(torch.cat(found), values.flatten())
        assert (
            run == 100 or set(read) == set(range(5)) and len(read) <= 5 + 60 // run
        )  # a row where two runs meet: twice
        assert run != 3 or len(read) == 5
