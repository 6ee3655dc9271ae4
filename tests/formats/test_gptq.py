"""GPTQ: what the contract of all formats does not test."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import gptq
from safetensors.torch import save_file

from deus_merge.checkpoint.dequantized import DequantizedSource, dequantized
from deus_merge.checkpoint.formats.gptq import FORMAT
from deus_merge.checkpoint.reader import Checkpoint
from deus_merge.core.errors import CheckpointError

MODULE = "model.layers.1.mlp.up_proj"
NAME = f"{MODULE}.weight"
Tensors = dict[str, torch.Tensor]


def stored(module: str = MODULE, shape: tuple[int, int] = (48, 96), **section: object) -> Tensors:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    made = gptq.parts(weight, gptq.ACT_ORDER | section)
    return {f"{module}.{part}": value for part, value in made.items()}


def opened(folder: Path, tensors: Mapping[str, torch.Tensor], **section: object) -> DequantizedSource:
    folder.mkdir(exist_ok=True)
    settings = {k: v for k, v in (gptq.ACT_ORDER | section).items() if v != "absent"}
    (folder / "config.json").write_text(json.dumps({"dtype": "float16", "quantization_config": settings}))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    source = dequantized(Checkpoint.open(folder))
    assert isinstance(source, DequantizedSource)
    return source


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "size", "act"), [(2, 32, True), (4, 40, False), (8, 96, True), (4, -1, False)])
def test_rows_are_as_the_layout_says(tmp_path, bits, size, act, version):
    section = {"bits": bits, "group_size": size, "desc_act": act, "checkpoint_format": version}
    source = opened(tmp_path, stored(**section), **section)
    expected = gptq.values(tmp_path)[NAME]
    for start, stop in ((0, 48), (0, 1), (3, 5), (15, 17), (16, 32), (47, 48), (8, 8)):
        assert torch.equal(source.slice(NAME, start, stop), expected[start:stop])


def test_groups_of_zeros_are_groups_in_their_order(tmp_path):
    """As exllama's kernels have it; 96 inputs in groups of 40."""
    section = {"group_size": 40, "desc_act": False}
    tensors = stored(**section)
    expected = opened(tmp_path / "numbers", tensors, **section).read(NAME)
    tensors[f"{MODULE}.g_idx"].zero_()
    assert torch.equal(opened(tmp_path / "zeros", tensors, **section).read(NAME), expected)


def test_a_word_by_hand(tmp_path):
    """Codes of inputs from the lowest bits, the last with the sign's; zero points 0, 1, ... 7, stored minus one."""
    zeros = (0x76543210 - 0x11111111) & 0xFFFFFFFF
    tensors = {
        f"{MODULE}.qweight": torch.from_numpy(np.full((1, 8), 0xF7654321, dtype=np.uint32).view(np.int32)),
        f"{MODULE}.qzeros": torch.from_numpy(np.array([[zeros]], dtype=np.uint32).view(np.int32)),
        f"{MODULE}.scales": torch.full((1, 8), 0.5, dtype=torch.float16),
        f"{MODULE}.g_idx": torch.zeros(8, dtype=torch.int32),
    }
    source = opened(tmp_path, tensors, group_size=-1)
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 15])
    assert torch.equal(source.read(NAME), (codes - torch.arange(8)[:, None]) / 2)


def test_the_version_has_two_keys_and_a_default(tmp_path):
    one, two = stored(), stored(checkpoint_format="gptq_v2")
    expected = opened(tmp_path / "v2", two, checkpoint_format="gptq_v2").read(NAME)
    for i, (tensors, keys) in enumerate((
        (one, {"checkpoint_format": "absent"}), (one, {"checkpoint_format": "gptq", "format": "gptq_v2"}),
        (two, {"checkpoint_format": "absent", "format": "gptq_v2"}),
    )):  # fmt: skip
        assert torch.equal(opened(tmp_path / str(i), tensors, **keys).read(NAME), expected)


def test_rules_for_modules(tmp_path):
    """The first rule that matches from the beginning of a name decides."""
    other = "model.layers.2.mlp.up_proj"
    rules = {r"-:.*\.o_proj": {}, r"layers\.2": {"bits": 2}, r"+:.*\.2\..*": {"bits": 8, "group_size": 48},
             ".*": {"bits": 4}}  # fmt: skip
    tensors = stored() | stored(other, bits=8, group_size=48)
    source = opened(tmp_path, tensors, dynamic=rules)
    for name, expected in gptq.values(tmp_path).items():
        assert torch.equal(source.read(name), expected)


def test_only_the_words_of_the_rows_are_unpacked(tmp_path, monkeypatch):
    source, expected = opened(tmp_path, stored(shape=(800, 96))), gptq.values(tmp_path)[NAME]
    sizes: list[int] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, **more: sizes.append(np.prod(shape)) or empty(shape, **more))
    assert torch.equal(source.slice(NAME, 9, 17), expected[9:17])
    assert sizes and max(sizes) == 8 * 96


def drop(part: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(f"{MODULE}.{part}")


def put(part: str, *shape: int, dtype: torch.dtype = torch.int32) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({f"{MODULE}.{part}": torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("qzeros"), f"{MODULE}.qzeros, which belongs to {MODULE}.qweight, is missing"),
        (drop("scales"), f"{MODULE}.scales, which belongs to {MODULE}.qweight, is missing"),
        (drop("g_idx"), f"{MODULE}.g_idx, which belongs to {MODULE}.qweight, is missing"),
        (drop("qweight"), f"{MODULE}.qweight, which belongs to"),
        (put("qweight", 12, 48, dtype=torch.int64), f"{MODULE}.qweight: unexpected dtype"),
        (put("qweight", 12, 48, 1), f"{MODULE}.qweight: unexpected shape"),
        (put("qweight", 12, 47), f"{MODULE}.qweight: its zero points"),
        (put("qweight", 20, 48), f"{MODULE}.scales does not fit"),
        (put("qzeros", 3, 5), f"{MODULE}.qzeros does not fit"),
        (put("qzeros", 3, 6, dtype=torch.float16), f"{MODULE}.qzeros: unexpected dtype"),
        (put("scales", 2, 48, dtype=torch.float16), f"{MODULE}.scales does not fit"),
        (put("scales", 3, 48), f"{MODULE}.scales: unexpected dtype"),
        (put("g_idx", 95), f"{MODULE}.g_idx does not fit"),
        (put("g_idx", 96, dtype=torch.float32), f"{MODULE}.g_idx: unexpected dtype"),
        (put("weight", 48, 96, dtype=torch.float16), f"{NAME} is stored both quantised and as it is"),
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
    [("bits", 3), ("bits", 5), ("bits", 4.0), ("bits", [4]),
     ("checkpoint_format", "marlin"), ("format", "bitblas"), ("pack_dtype", "int16"),
     ("is_marlin_format", True), ("adapter", {"rank": 8}), ("rotation", "hadamard"), ("group_size", 0),
     ("group_size", None), ("dynamic", {".*": {"bits": 3}})],
)  # fmt: skip
def test_other_layouts_are_refused_by_name(tmp_path, key, value):
    more = {"checkpoint_format": "absent"} if key == "format" else {}
    with pytest.raises(CheckpointError) as error:
        opened(tmp_path, stored(), **more, **{key: value})
    assert ("bits 3" if key == "dynamic" else key) in str(error.value) and f"{MODULE}.qweight" in str(error.value)


@pytest.mark.parametrize("group", [3, -1])
def test_groups_that_do_not_exist_are_refused(tmp_path, group):
    tensors = stored()
    tensors[f"{MODULE}.g_idx"][5] = group
    with pytest.raises(CheckpointError, match=f"{MODULE}.g_idx has groups that do not exist"):
        opened(tmp_path, tensors).slice(NAME, 0, 1)


def test_scales_that_are_not_numbers_are_refused(tmp_path):
    tensors = stored()
    tensors[f"{MODULE}.scales"][2, 47] = float("nan")
    with pytest.raises(CheckpointError, match=f"{MODULE}.scales holds NaN"):
        opened(tmp_path, tensors).slice(NAME, 0, 1)


def test_modules_in_floating_point_have_rules_before_all_others():
    section = {"quant_method": "gptq", "dynamic": {"+:.*": {"bits": 8}}}
    modules = ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.experts.3.up_proj"]
    changed = FORMAT.except_modules(section, modules, ["lm_head"])
    assert section["dynamic"] == {"+:.*": {"bits": 8}} and "modules_in_block_to_quantize" not in changed

    def quantized(name: str) -> bool:
        first = next(key for key in changed["dynamic"] if re.match(key[2:], name))
        return not first.startswith("-:")

    left_out = [*modules, "model.layers.1.mlp.gate_up_proj", "model.layers.1.mlp.experts"]
    assert not any(quantized(name) for name in left_out)
    for name in left_out:
        for near in (name.replace("1", "11"), f"{name}x", f"x.{name}", name.replace(".", "x", 1)):
            assert quantized(near)
    assert FORMAT.except_modules({"dynamic": None}, ["a.b"], [])["dynamic"] == {r"-:^a\.b$": {}}


def test_transformers_reads_which_modules_are_quantised():
    quantized = ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"]
    section = {"modules_in_block_to_quantize": [["mlp.up_proj"]]}
    changed = FORMAT.except_modules(section, [MODULE], ["lm_head"], quantized)
    assert changed["modules_in_block_to_quantize"] == [quantized]
