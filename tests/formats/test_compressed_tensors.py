"""compressed-tensors: what the shared contract of formats does not test."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.utils.match import match_name
from makers.compressed_tensors import FP8, GROUPS, INT4, VARIANTS, _extremes, group
from safetensors.torch import load_file
from tiny_float_models import write_float_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deus_merge.checkpoint.dequantized import dequantized
from deus_merge.checkpoint.formats._compressed_tensors_groups import group_of, groups
from deus_merge.checkpoint.formats._packed_codes import pack_columns
from deus_merge.checkpoint.formats.base import Weight
from deus_merge.checkpoint.formats.compressed_tensors import FORMAT
from deus_merge.checkpoint.reader import Checkpoint
from deus_merge.core.errors import CheckpointError
from deus_merge.core.tensors import Quantization, StoredTensor
from deus_merge.core.units import stored_dtypes

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of each variant, made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            write_float_model(VARIANTS[name].model, root / "float")
            VARIANTS[name].make(root / "float", root / "quantised")
            made[name] = root / "quantised"
        return made[name]

    return folder


def headers(tensors: dict[str, torch.Tensor]) -> dict[str, StoredTensor]:
    codes = stored_dtypes()
    return {
        name: StoredTensor(name, codes[t.dtype], tuple(t.shape), Path("m/model.safetensors"), 0, t.nbytes)
        for name, t in tensors.items()
    }


def found(tensors: dict[str, torch.Tensor], section: dict) -> dict[str, Weight]:
    return {weight.name: weight for weight in FORMAT.weights(headers(tensors), section, tensors.__getitem__)}


def as_stored(weight: Weight) -> StoredTensor:
    parts = weight.quantization.parts.values()
    return StoredTensor(weight.name, "BF16", weight.shape, next(iter(parts)).file, 0, 0, True, weight.quantization)


def only(tensors: dict[str, torch.Tensor], section: dict) -> tuple[StoredTensor, dict[str, torch.Tensor]]:
    """The one weight of a checkpoint, and its parts."""
    (weight,) = found(tensors, section).values()
    return as_stored(weight), {label: tensors[part.name] for label, part in weight.quantization.parts.items()}


def config(format_: str, weights: dict, **changes: object) -> dict:
    entry = group(weights)
    return {"quant_method": "compressed-tensors", "format": format_, "config_groups": {"g": entry}, **changes}


@pytest.mark.parametrize("name", VARIANTS)
def test_any_rows_are_the_library_s(folders, name: str):
    """Row ranges that no block and no packed word fits; nothing stored is changed, and nothing is left over."""
    source = dequantized(Checkpoint.open(folders(name)))
    expected, stored = VARIANTS[name].values(folders(name)), load_file(folders(name) / "model.safetensors")
    assert {n for n, t in source.tensors.items() if t.quantization} == set(expected)
    for weight in (n for n in expected if "layers.1" in n):
        held = source.tensors[weight].quantization
        assert isinstance(held, Quantization)
        parts = {label: stored[part.name] for label, part in held.parts.items()}
        before = {label: part.clone() for label, part in parts.items()}
        out = expected[weight].shape[0]
        for start, stop in ((0, 0), (1, 2), (7, 9), (out // 2 - 3, out // 2 + 29), (out - 1, out), (0, out)):
            values = FORMAT.dequantize(source.tensors[weight], parts, start, stop)
            assert values.dtype == torch.float32
            assert torch.equal(values, expected[weight][start:stop]), (weight, start, stop)
        assert all(
            torch.equal(part.view(torch.uint8), before[label].view(torch.uint8)) for label, part in parts.items()
        )


class _Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is computed."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, leaf.nbytes)
        return result


@pytest.mark.parametrize("name", ["ct_fp8_block", "ct_int8", "ct_int4_ordered", "ct_nvfp4"])
def test_memory_is_that_of_the_rows(folders, name: str):
    source = dequantized(Checkpoint.open(folders(name)))
    held = source.tensors[f"{UP}.weight"]
    assert held.quantization
    parts = {label: source.stored.read(part.name) for label, part in held.quantization.parts.items()}  # type: ignore
    with _Largest() as largest:
        FORMAT.dequantize(held, parts, 9, 11)
    assert 0 < largest.bytes <= 2 * 8 * held.shape[1]  # 2 rows in float32, or an index of columns


def test_columns_in_their_own_order(folders):
    """Columns of the library's, shuffled by group; -1 anywhere means that there is no such order."""
    tensors = load_file(folders("ct_int4_ordered") / "model.safetensors")
    section = json.loads((folders("ct_int4_ordered") / "config.json").read_text())["quantization_config"]
    tensors = {name: t for name, t in tensors.items() if name.startswith(UP)}
    weight, parts = only(tensors, section)
    shuffled = FORMAT.dequantize(weight, parts, 0, 320)
    plain = FORMAT.dequantize(weight, {label: part for label, part in parts.items() if label != "order"}, 0, 320)
    parts["order"] = parts["order"].index_fill(0, torch.tensor([5]), -1)
    assert torch.equal(FORMAT.dequantize(weight, parts, 0, 320), plain) and not torch.equal(plain, shuffled)
    for group_ in (3, -2):
        parts["order"] = parts["order"].index_fill(0, torch.tensor([5]), group_)
        with pytest.raises(CheckpointError, match=rf"{UP}.weight_g_idx names groups that do not exist"):
            FORMAT.dequantize(weight, parts, 0, 1)
    section["config_groups"]["group_0"]["weights"]["actorder"] = None  # what is stored counts
    assert torch.equal(FORMAT.dequantize(*only(tensors, section), 0, 320), shuffled)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_words_with_a_rest(bits: int, symmetric: bool):
    """21 columns and 5 rows fill no word of any width. Groups of 7 or whole rows."""
    torch.manual_seed(bits)
    low, high = -(1 << bits - 1), 1 << bits - 1
    for settings, grid in (({"strategy": "group", "group_size": 7}, 3), ({"strategy": "channel"}, 1)):
        codes = torch.randint(low, high, (5, 21), dtype=torch.int8)
        zeros = torch.randint(low, high, (5, grid), dtype=torch.int8)
        scales = torch.rand(5, grid) + 0.1
        tensors = {
            "m.weight_packed": pack_to_int32(codes, bits),
            "m.weight_scale": scales,
            "m.weight_shape": torch.tensor([5, 21]),
        }
        if not symmetric:
            tensors["m.weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0)
        scheme = {"num_bits": bits, "type": "int", "symmetric": symmetric} | settings
        weight, parts = only(tensors, config("pack-quantized", scheme))
        shift = 0 if symmetric else zeros.float().repeat_interleave(21 // grid, 1)
        expected = (codes.float() - shift) * scales.repeat_interleave(21 // grid, 1)
        assert weight.shape == (5, 21)
        assert torch.equal(FORMAT.dequantize(weight, parts, 1, 4), expected[1:4])
        assert torch.equal(pack_columns(codes, bits), tensors["m.weight_packed"])


def test_older_spellings_and_shapes():
    """Zero points beside plain codes, blocks as text, scales without their axis of size one, a nested section."""
    codes = torch.randint(-128, 128, (5, 12), dtype=torch.int8)
    zeros, scales = torch.randint(-128, 128, (5, 3), dtype=torch.int8), torch.rand(5, 3).half()
    tensors = {"m.weight": codes, "m.weight_scale": scales, "m.weight_zero_point": zeros}
    scheme = {"num_bits": 8, "type": "int", "symmetric": False, "group_size": 4}  # strategy: group
    nested = {"quantization_config": config("naive-quantized", scheme), "sparsity_config": {"format": "dense"}}
    assert FORMAT.matches(nested)
    weight, parts = only(tensors, nested)
    expected = (codes.float() - zeros.float().repeat_interleave(4, 1)) * scales.float().repeat_interleave(4, 1)
    assert torch.equal(FORMAT.dequantize(weight, parts, 0, 5), expected)

    scheme = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": 4}  # and zero points all the same
    assert torch.equal(FORMAT.dequantize(*only(tensors, config("int-quantized", scheme)), 0, 5), expected)
    del tensors["m.weight"]
    tensors |= {"m.weight_packed": pack_to_int32(codes, 8), "m.weight_shape": torch.tensor([5, 12])}
    assert torch.equal(FORMAT.dequantize(*only(tensors, config("pack-quantized", scheme)), 0, 5), expected)

    floats = torch.randn(5, 12).to(torch.float8_e4m3fn)
    block = torch.rand(2, 2)
    weight, parts = only(
        {"m.weight": floats, "m.weight_scale": block},
        config("float-quantized", FP8 | {"strategy": "block", "block_structure": "4x8"}),
    )
    spread = block.repeat_interleave(4, 0)[:5].repeat_interleave(8, 1)[:, :12]
    assert torch.equal(FORMAT.dequantize(weight, parts, 3, 5), (floats.float() * spread)[3:5])
    huge = config("float-quantized", FP8 | {"strategy": "block", "block_structure": [1 << 40, 1 << 40]})
    weight, parts = only({"m.weight": floats, "m.weight_scale": block[:1, :1]}, huge)
    assert torch.equal(FORMAT.dequantize(weight, parts, 0, 5), floats.float() * block[0, 0])
    assert FORMAT.quantize(floats.float(), weight)["codes"].shape == (5, 12)
    for scales, strategy in ((torch.rand(()), {}), (torch.rand(5), {"group_size": -1})):  # tensor, channel
        settings = config("float-quantized", FP8 | strategy)
        weight, parts = only({"m.weight": floats, "m.weight_scale": scales}, settings)
        assert torch.equal(FORMAT.dequantize(weight, parts, 2, 5), (floats.float() * scales.view(-1, 1))[-3:])
    plain = {"m.weight": torch.randn(5, 12)}
    assert not found(plain, config("dense", FP8)) and not found(plain, {"format": "dense", "config_groups": {}})


def test_no_tensor_is_read_where_headers_say_the_shape(folders):
    tensors = load_file(folders("ct_int4_experts") / "model.safetensors")
    section = json.loads((folders("ct_int4_experts") / "config.json").read_text())["quantization_config"]

    def peek(name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    assert len(list(FORMAT.weights(headers(tensors), section, peek))) == 3 * (4 + 4 * 3)


def test_all_that_travels_with_a_weight(folders):
    tensors = load_file(folders("ct_fp8_kv") / "model.safetensors")
    tensors |= {"model.layers.0.mlp.up_proj.output_scale": torch.ones(1)}
    section = json.loads((folders("ct_fp8_kv") / "config.json").read_text())["quantization_config"]
    weights = found(tensors, section)
    for key, beside in (
        ("self_attn.k_proj", set()),
        ("mlp.up_proj", {"mlp.up_proj.output_scale"}),
    ):
        parts = weights[f"model.layers.0.{key}.weight"].quantization.parts.values()
        names = {part.name.removeprefix("model.layers.0.") for part in parts}
        assert names == {f"{key}.{last}" for last in ("weight", "weight_scale", "input_scale")} | beside


@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        ("ct_fp8_channel", "weight_scale", None, "weight_scale, which belongs to .*up_proj.weight, is missing"),
        ("ct_int4_group", "weight_scale", None, "weight_scale, which belongs to .*weight_packed, is missing"),
        ("ct_int4_group", "weight_shape", None, "weight_shape, which belongs to .*weight_packed, is missing"),
        ("ct_int4_asymmetric", "weight_zero_point", None, "weight_zero_point, which belongs .*is missing"),
        ("ct_int4_ordered", "weight_g_idx", None, "weight_g_idx, which belongs .*is missing"),
        ("ct_nvfp4", "weight_global_scale", None, "weight_global_scale, which belongs .*is missing"),
        ("ct_nvfp4", "weight_packed", None, "belongs to no quantised weight"),
        ("ct_int8", "weight", None, "weight_scale belongs to no quantised weight"),
        ("ct_int8", "weight", torch.zeros(320, 192), "weight_scale belongs to no quantised weight"),
        ("ct_fp8_tensor", "weight_scale", torch.ones(2), r"weight_scale does not fit .*\n.*\[1\].*\n.*\[2\]"),
        ("ct_fp8_channel", "weight_scale", torch.ones(319, 1), "weight_scale does not fit"),
        ("ct_fp8_channel", "weight_scale", torch.ones(1), "weight_scale does not fit"),
        ("ct_fp8_block", "weight_scale", torch.ones(2, 2), "weight_scale does not fit"),
        ("ct_fp8_channel", "weight_scale", torch.ones(320, 1, dtype=torch.int32), "weight_scale: unexpected dtype"),
        ("ct_nvfp4", "weight_scale", torch.ones(320, 12), "weight_scale: unexpected dtype"),
        ("ct_nvfp4", "weight_global_scale", torch.ones(2), "weight_global_scale does not fit"),
        ("ct_nvfp4", "weight_packed", torch.zeros(320, 100, dtype=torch.uint8), "cannot be cut into groups"),
        ("ct_int4_group", "weight_packed", torch.zeros(320, 23, dtype=torch.int32), "weight_packed does not fit"),
        ("ct_int4_group", "weight_scale", torch.ones(320, 4), "weight_packed does not fit"),
        ("ct_int4_group", "weight_packed", torch.zeros(320, 96, dtype=torch.uint8), "weight_packed does not fit"),
        ("ct_int4_group", "weight_shape", torch.tensor([320]), "weight_shape does not fit"),
        ("ct_int8_packed", "weight_shape", torch.tensor([320, 191 - 8]), "weight_packed does not fit .*weight_shape"),
        ("ct_int8_packed", "weight_shape", torch.tensor([319, 192]), "weight_packed does not fit .*weight_shape"),
        ("ct_int4_asymmetric", "weight_zero_point", torch.zeros(320, 3, dtype=torch.int8), "_point: unexpected dtype"),
        ("ct_int4_asymmetric", "weight_zero_point", torch.zeros(39, 3, dtype=torch.int32), "zero_point does not fit"),
        ("ct_int4_ordered", "weight_g_idx", torch.zeros(191, dtype=torch.int32), "weight_g_idx does not fit"),
        ("ct_int8", "weight_g_idx", torch.zeros(192, dtype=torch.int32), "weight_g_idx belongs to no quantised weight"),
        ("ct_int8", "weight", torch.zeros(320, 192, 1, dtype=torch.int8), "up_proj.weight is not a matrix"),
        ("ct_int8", "weight", torch.zeros(320, 192).to(torch.float8_e4m3fn), "does not fit config_groups.group_0"),
        ("ct_int8", "weight_packed", torch.zeros(320, 48, dtype=torch.int32), "packed does not fit config_groups"),
    ],
)  # fmt: skip
def test_a_part_that_is_missing_or_does_not_fit(
    folders, name: str, part: str, change: torch.Tensor | None, message: str
):
    tensors = load_file(folders(name) / "model.safetensors")
    section = json.loads((folders(name) / "config.json").read_text())["quantization_config"]
    found(tensors, section)
    if change is None:
        del tensors[f"{UP}.{part}"]
    else:
        tensors[f"{UP}.{part}"] = change
    with pytest.raises(CheckpointError) as refused:
        found(tensors, section)
    assert refused.match(message) and UP in str(refused.value)


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("ct_int4_group", "format", "marlin-24"),
        ("ct_int4_group", "config_groups.group_0.format", "sparse-24-bitmask"),
        ("ct_mixed", "config_groups.group_0.format", None),
        ("ct_int4_group", "sparsity_config", {"format": "sparse-24-bitmask"}),
        ("ct_int4_group", "transform_config", {"config_groups": {"R1": {}}}),
        ("ct_int4_group", "config_groups.group_0.weights.num_bits", 3),
        ("ct_fp8_channel", "config_groups.group_0.weights.num_bits", 4),
        ("ct_fp8_channel", "config_groups.group_0.weights.strategy", "token"),
        ("ct_fp8_channel", "config_groups.group_0.weights.type", "posit"),
        ("ct_int4_group", "config_groups.group_0.weights.type", "float"),
        ("ct_fp8_channel", "config_groups.group_0.weights.scale_dtype", "torch.uint8"),
        ("ct_nvfp4", "config_groups.group_0.weights.symmetric", False),
        ("ct_int4_group", "config_groups.group_0.weights.group_size", 0),
        ("ct_int4_group", "config_groups.group_0.weights.actorder", "random"),
        ("ct_fp8_block", "config_groups.group_0.weights.block_structure", [128]),
        ("ct_int4_group", "config_groups.group_0", ["Linear"]),
        ("ct_int4_group", "config_groups.group_0.targets", ["re:("]),
        ("ct_int4_group", "config_groups.group_0.targets", "Linear"),
        ("ct_int4_group", "config_groups", ["group_0"]),
        ("ct_int4_group", "config_groups.group_0.format", ["pack-quantized"]),
        ("ct_int4_group", "format", ["pack-quantized"]),
    ],
)
def test_settings_that_nobody_described(folders, name: str, path: str, value: object):
    tensors = load_file(folders(name) / "model.safetensors")
    section = json.loads((folders(name) / "config.json").read_text())["quantization_config"]
    *way, last = path.split(".")
    changed = inside = copy.deepcopy(section)
    for key in way:
        inside = inside[key]
    inside[last] = value
    with pytest.raises(CheckpointError) as refused:
        found(tensors, changed)
    shown = value.get("format", value) if isinstance(value, dict) else "mixed-precision" if value is None else value
    assert refused.match(f"quantization_config.{path}: ")
    assert f"got:      {'re:(' if shown == ['re:('] else shown}\n" in str(refused.value)


def test_which_group_a_module_has(folders):
    """A name, then a pattern in the order of the alphabet, then a class; the library agrees (see ``ct_mixed``)."""
    entries = {
        "class": group(FP8, targets=("Linear",)),
        "pattern": group(FP8, targets=("re:.*up_proj", "re:.*down_proj")),
        "earlier": group(FP8, targets=("re:.*[u]p_proj",)),
        "name": group(FP8, targets=("layers.1.up_proj",)),
        "embedding": group(FP8, targets=("Embedding",)),
        "activations": group({}, targets=("layers.3.up_proj",)) | {"weights": None},
    }
    among = groups({"format": "float-quantized", "config_groups": entries}, None)

    def key(module: str, some=among) -> str | None:
        return (chosen := group_of(module, some)) and chosen.key.removeprefix("config_groups.")

    assert [key(f"layers.{n}.up_proj") for n in (1, 2, 3)] == ["name", "earlier", "earlier"]
    assert [key(f"layers.1.{m}") for m in ("down_proj", "gate_proj", "embed")] == ["pattern", "class", "embedding"]
    assert key("layers.1.gate_proj", among[1:3]) is None
    assert key("layers.1.gate_proj", among[1:2]) == "pattern"  # a config with one group leaves no choice

    tensors = load_file(folders("ct_mixed") / "model.safetensors")
    section = json.loads((folders("ct_mixed") / "config.json").read_text())["quantization_config"]
    section["config_groups"]["group_1"]["targets"] = [r"re:.*mlp\.(gate|down)_proj$"]
    with pytest.raises(CheckpointError, match="no group of the config targets model.layers.0.mlp.up_proj"):
        found(tensors, section)


def _like(scheme: QuantizationScheme, shape: tuple[int, int], scales: torch.Tensor) -> StoredTensor:
    """A weight of a scheme whose parts have the library's shapes."""
    args = scheme.weights
    assert args is not None
    state = {"weight": torch.zeros(shape), "weight_scale": scales}
    compressor: Any = BaseCompressor.get_value_from_registry(str(scheme.format))
    tensors = {f"m.{k}": t for k, t in compressor.compress(state, scheme).items()}
    section = {"format": scheme.format, "config_groups": {"g": scheme.model_dump(mode="json")}}
    return only(tensors, section)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("format_", "weights"),
    [
        ("float-quantized", FP8 | {"strategy": "tensor"}),
        ("float-quantized", FP8 | {"strategy": "channel"}),
        ("float-quantized", FP8 | {"strategy": "block", "block_structure": [16, 24]}),
        ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        ("int-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 10}),
        ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        ("pack-quantized", INT4 | {"group_size": 10}),
    ],
)
def test_new_weights_are_quantised_as_the_library_does(format_: str, weights: dict, dtype: torch.dtype):
    """Codes and scales bit for bit, where the library computes in float32; blocks of zeros, and of tiny values."""
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights, "format": format_})
    args = scheme.weights
    assert args is not None
    values = torch.randn(37, 50, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 1, 37)[:, None]
    values[16:32, 0:24] = 0.0
    values[33] = 0.0
    values[34] = 1e-9
    scales = calculate_qparams(*_extremes(values, args), args)[0]
    eps = torch.finfo(dtype).eps
    scales = torch.where(_extremes(values.abs(), args)[1] == 0, torch.tensor(eps), scales).to(dtype)
    scales = torch.where(scales == 0, torch.tensor(eps, dtype=dtype), scales)  # 1e-9 / 448 is zero in float16
    like = _like(scheme, (37, 50), scales)
    made = FORMAT.quantize(values.clone(), like)
    compressor: Any = BaseCompressor.get_value_from_registry(format_)
    expected = compressor.compress({"weight": values, "weight_scale": scales.float()}, scheme)
    assert like.quantization
    for label, part in like.quantization.parts.items():
        name = part.name.removeprefix("m.")
        want = scales if label == "scales" else expected[name]
        assert made[label].dtype == want.dtype and made[label].shape == want.shape
        assert torch.equal(made[label].view(torch.uint8), want.view(torch.uint8)), label
    again = FORMAT.dequantize(like, made, 0, 37)
    assert torch.equal(again[33], torch.zeros(50)) and torch.equal(again[16:32, :20], torch.zeros(16, 20))
    assert FORMAT.check(like, made) is None
    if args.type == "float":
        assert torch.equal(FORMAT.quantize(again, like)["codes"].view(torch.uint8), made["codes"].view(torch.uint8))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("ct_fp8_tensor", "input_scale is not computed from weights"),
        ("ct_int4_asymmetric", "weight_zero_point is not computed"),
        ("ct_nvfp4", "rounding to NVFP4 is not defined"),
        ("ct_int8", None),
    ],
)
def test_weights_that_cannot_be_quantised_anew(folders, name: str, why: str | None):
    source = dequantized(Checkpoint.open(folders(name)))
    reason = FORMAT.refusal(source.tensors[f"{UP}.weight"])
    assert reason is None if why is None else why in str(reason), reason


def test_scales_that_are_no_numbers(folders):
    source = dequantized(Checkpoint.open(folders("ct_nvfp4")))
    held = source.tensors[f"{UP}.weight"]
    assert held.quantization
    parts = {label: source.stored.read(part.name).clone() for label, part in held.quantization.parts.items()}  # type: ignore
    parts["input_global_scale"].fill_(torch.nan)  # of activations: weights do not depend on it
    assert FORMAT.check(held, parts) is None
    assert FORMAT.check(held, parts | {"scale_of_scales": torch.tensor([torch.inf])}) == (
        f"{UP}.weight_global_scale",
        "holds infinity",
    )
    parts["scales"].view(torch.uint8)[3, 3] = 0x7F
    assert FORMAT.check(held, parts) == (f"{UP}.weight_scale", "holds NaN")


def test_modules_that_loaders_leave_out():
    section = config("float-quantized", FP8, ignore=["lm_head", "re:.*gate$"])
    new = ["lm_head", UP, "model.layers.1.mlp.experts"]
    changed = FORMAT.except_modules(section, new, ["model.embed_tokens"])
    assert {**changed, "ignore": section["ignore"]} == section
    assert changed["ignore"][:4] == ["lm_head", "re:.*gate$", UP, "model.layers.1.mlp.experts"]
    assert section["ignore"] == ["lm_head", "re:.*gate$"]

    def left_out(module: str) -> bool:
        return any(match_name(module, target) for target in changed["ignore"])

    assert left_out("model.layers.1.mlp.experts.0.up_proj") and left_out("model.layers.1.mlp.experts")
    assert not left_out("model.layers.11.mlp.experts.0.up_proj") and not left_out(
        "model.layers.1.mlpXexperts.0.up_proj"
    )
    assert FORMAT.except_modules({"ignore": None}, [UP], ["lm_head"])["ignore"] == [UP]  # no loader leaves out the head
    nested = FORMAT.except_modules({"quantization_config": section}, [UP], [])
    assert nested["quantization_config"]["ignore"][-1] == UP and "ignore" not in nested


def test_sections_of_other_formats():
    assert FORMAT.matches({"quant_method": "compressed-tensors"})
    assert FORMAT.matches({"config_groups": {}}) and FORMAT.matches({"quant_method": "sparseml", "format": "dense"})
    assert not FORMAT.matches({"quant_method": "quark", "config_groups": {}})
    assert not FORMAT.matches({"quant_method": "fp8"}) and not FORMAT.matches({})
    assert set(GROUPS) == set(VARIANTS)
