"""The pass over the weights: differences and NaN are found in every chunk of a tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from deus_merge.checkpoint import Checkpoint
from deus_merge.core.tensors import StoredTensor
from deus_merge.verify.weights import ZEROS, TensorCheck, examine

SIZE = 150_000  # elements: several chunks of 256 KiB, the last one shorter
PLACES = [0, 65_535, 65_536, SIZE - 1]


def stored(folder: Path, values: torch.Tensor) -> StoredTensor:
    """A tensor in a file."""
    folder.mkdir()
    save_file({"w": values}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({}))
    return Checkpoint.open(folder).tensors["w"]


@pytest.fixture
def values() -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(0)).bfloat16().float()  # (n,)


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("wide", [False, True])
def test_a_difference_anywhere_is_found(tmp_path, values, at, wide):
    source = stored(tmp_path / "source", values.bfloat16() if wide else values)
    same = stored(tmp_path / "same", values)
    changed = values.clone()
    changed[at] += 1
    other = stored(tmp_path / "other", changed)
    assert TensorCheck(same, source).widened is wide
    assert examine([TensorCheck(same, source)], finite=False)["w"].equal is True
    assert examine([TensorCheck(other, source)], finite=False)["w"].equal is False
    result = examine([TensorCheck(other, None)], finite=False)["w"]
    assert (result.equal, result.finite) == (None, None)
    assert result.checksum == xxhash.xxh3_128_hexdigest(changed.numpy().tobytes())


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_found_anywhere(tmp_path, values, at, value):
    values[0] = torch.finfo(torch.float32).max
    assert examine([TensorCheck(stored(tmp_path / "good", values), None)], finite=True)["w"].finite is True
    values[at] = value
    assert examine([TensorCheck(stored(tmp_path / "bad", values), None)], finite=True)["w"].finite is False


@pytest.mark.parametrize("at", PLACES)
def test_zeros_are_zeros_anywhere(tmp_path, at):
    zeros = torch.zeros(SIZE)
    assert examine([TensorCheck(stored(tmp_path / "zeros", zeros), ZEROS)], finite=False)["w"].equal is True
    zeros[at] = -0.0  # another sign is another byte
    assert examine([TensorCheck(stored(tmp_path / "not", zeros), ZEROS)], finite=False)["w"].equal is False
