"""AWQ: what the contract of all formats does not test."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import awq
from safetensors.torch import save_file

from deus_merge.checkpoint.dequantized import DequantizedSource, dequantized
from deus_merge.checkpoint.formats.awq import FORMAT
from deus_merge.checkpoint.reader import Checkpoint
from deus_merge.core.errors import CheckpointError

MODULE = "model.layers.1.mlp.up_proj"
NAME = f"{MODULE}.weight"
Tensors = dict[str, torch.Tensor]


def stored(shape: tuple[int, int] = (40, 96), size: int = 32) -> Tensors:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return {f"{MODULE}.{part}": value for part, value in awq.parts(weight, size).items()}


def opened(folder: Path, tensors: Mapping[str, torch.Tensor], **section: object) -> DequantizedSource:
    folder.mkdir(exist_ok=True)
    settings = awq.SECTION | {"group_size": 32} | section
    config = {"dtype": "float16", "quantization_config": {k: v for k, v in settings.items() if v != "absent"}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    source = dequantized(Checkpoint.open(folder))
    assert isinstance(source, DequantizedSource)
    return source


@pytest.mark.parametrize("size", [32, 96, -1])
def test_rows_are_as_the_layout_says(tmp_path, size):
    source = opened(tmp_path, stored(size=96 if size == -1 else size), group_size=size)
    expected = awq.values(tmp_path)[NAME]
    for start, stop in ((0, 40), (0, 1), (7, 9), (13, 14), (16, 24), (39, 40), (8, 8)):
        assert torch.equal(source.slice(NAME, start, stop), expected[start:stop])


def test_a_word_by_hand(tmp_path):
    """Nibbles from the lowest: outputs 0, 2, 4, 6, 1, 3, 5, 7; the highest one has the sign's bit."""
    tensors = {
        f"{MODULE}.qweight": torch.from_numpy(np.array([[0xF7531642], [0x0]], dtype=np.uint32).view(np.int32)),
        f"{MODULE}.qzeros": torch.tensor([[0x11111111]], dtype=torch.int32),
        f"{MODULE}.scales": torch.full((1, 8), 0.5, dtype=torch.float16),
    }
    source = opened(tmp_path, tensors, group_size=-1)
    first = [2, 3, 4, 5, 6, 7, 1, 15]  # of input 0, by outputs
    assert source.read(NAME).tolist() == [[(code - 1) / 2, -0.5] for code in first]


def test_names_of_settings_of_older_versions(tmp_path):
    old = {"bits": "absent", "group_size": "absent", "version": "GEMM", "w_bit": 4, "q_group_size": 32}
    assert torch.equal(opened(tmp_path, stored(), **old).read(NAME), awq.values(tmp_path)[NAME])


def test_only_the_words_of_the_rows_are_unpacked(tmp_path, monkeypatch):
    source, expected = opened(tmp_path, stored((800, 96))), awq.values(tmp_path)[NAME]
    sizes: list[int] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, **more: sizes.append(np.prod(shape)) or empty(shape, **more))
    assert torch.equal(source.slice(NAME, 9, 17), expected[9:17])
    assert sizes and max(sizes) == 16 * 96


def drop(part: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(f"{MODULE}.{part}")


def put(part: str, *shape: int, dtype: torch.dtype = torch.int32) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({f"{MODULE}.{part}": torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("qzeros"), f"{MODULE}.qzeros, which belongs to {MODULE}.qweight, is missing"),
        (drop("scales"), f"{MODULE}.scales, which belongs to {MODULE}.qweight, is missing"),
        (drop("qweight"), f"{MODULE}.qweight, which belongs to"),
        (put("qweight", 96, 5, dtype=torch.int64), f"{MODULE}.qweight: unexpected dtype"),
        (put("qweight", 96, 5, 1), f"{MODULE}.qweight: unexpected shape"),
        (put("qweight", 80, 5), "group_size does not divide the inputs (80)"),
        (put("qzeros", 3, 4), f"{MODULE}.qzeros does not fit"),
        (put("qzeros", 3, 5, dtype=torch.float16), f"{MODULE}.qzeros: unexpected dtype"),
        (put("scales", 3, 5, dtype=torch.float16), f"{MODULE}.scales does not fit"),
        (put("scales", 40, 3, dtype=torch.float16), f"{MODULE}.scales does not fit"),
        (put("scales", 3, 40), f"{MODULE}.scales: unexpected dtype"),
        (put("weight", 40, 96, dtype=torch.float16), f"{NAME} is stored both quantised and as it is"),
    ],
)
def test_a_broken_checkpoint_is_refused(tmp_path, change, message):
    tensors = stored()
    change(tensors)
    with pytest.raises(CheckpointError) as error:
        opened(tmp_path, tensors)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("version", "gemv"), ("version", "gemv_fast"), ("version", "marlin"), ("format", "gemv"), ("bits", 8),
     ("bits", "absent"), ("backend", "llm-awq"), ("group_size", 0), ("group_size", None),
     ("dynamic", {"+:.*": {"group_size": 64}})],
)  # fmt: skip
def test_other_layouts_are_refused_by_name(tmp_path, key, value):
    with pytest.raises(CheckpointError) as error:
        opened(tmp_path, stored(), **{key: value})
    assert key in str(error.value) and f"{MODULE}.qweight" in str(error.value)


def test_scales_that_are_not_numbers_are_refused(tmp_path):
    tensors = stored()
    tensors[f"{MODULE}.scales"][2, 39] = float("inf")
    with pytest.raises(CheckpointError, match=f"{MODULE}.scales holds infinity"):
        opened(tmp_path, tensors).slice(NAME, 0, 1)


def test_modules_in_floating_point_are_listed():
    section = {"quant_method": "awq", "modules_to_not_convert": ["gate"]}
    modules = ["model.layers.3.mlp.experts.0.up_proj", "model.layers.3.mlp.experts.1.up_proj"]
    named = FORMAT.except_modules(section, modules, ["lm_head"])
    assert named["modules_to_not_convert"] == ["gate", *modules, "model.layers.3.mlp.experts"]
    assert section["modules_to_not_convert"] == ["gate"]
    named = FORMAT.except_modules({"modules_to_not_convert": None}, ["model.layers.3.mlp.up_proj"], ["lm_head"])
    assert named["modules_to_not_convert"] == ["lm_head", "model.layers.3.mlp.up_proj"]
