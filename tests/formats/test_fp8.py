"""FP8 beyond what all formats promise: odd rows, all kinds of scales, quantising as transformers does, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from makers.fp8 import VARIANTS
from safetensors.torch import load_file
from tiny_float_models import write_float_model
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.quantizers.quantizers_utils import should_convert_module

from deus_merge.checkpoint.formats.base import Weight
from deus_merge.checkpoint.formats.fp8 import FORMAT
from deus_merge.core.errors import CheckpointError
from deus_merge.core.tensors import StoredTensor
from deus_merge.core.units import stored_dtypes

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
CODES = stored_dtypes() | {E8M0: "F8_E8M0"}
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 64], "activation_scheme": "dynamic"}
PLAIN = {"quant_method": "fp8", "activation_scheme": "static"}
NAME = "model.layers.1.self_attn.k_proj.weight"
MODULE = NAME.removesuffix("weight")


def stored(tensors: dict[str, torch.Tensor]) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(name, CODES[t.dtype], tuple(t.shape), Path("model.safetensors"), 0, t.nbytes)
        for name, t in tensors.items()
    }


def weights(tensors: dict[str, torch.Tensor], section: dict) -> dict[str, Weight]:
    found = FORMAT.weights(stored(tensors), section, tensors.__getitem__)
    return {weight.name: weight for weight in found}


def logical(weight: Weight) -> StoredTensor:
    return StoredTensor(weight.name, "BF16", weight.shape, Path("x"), 0, 0, True, weight.quantization)


def parts(weight: Weight, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {label: tensors[part.name] for label, part in weight.quantization.parts.items()}


def dequantize(
    weight: Weight, tensors: dict[str, torch.Tensor], start: int = 0, stop: int | None = None
) -> torch.Tensor:
    stop = weight.shape[0] if stop is None else stop
    return FORMAT.dequantize(logical(weight), parts(weight, tensors), start, stop)


def random_codes(*shape: int, dtype: torch.dtype = E4M3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=generator) * 100).clamp(-448, 448).to(dtype)


def random_scales(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if dtype in (E8M0, torch.uint8):
        return torch.randint(100, 130, shape, generator=generator).to(torch.uint8).view(dtype)
    return (torch.rand(*shape, generator=generator) + 0.5).to(dtype)


@pytest.fixture(scope="module", params=list(VARIANTS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder, variant = tmp_path_factory.mktemp(request.param), VARIANTS[request.param]
    write_float_model(variant.model, folder / "base")
    variant.make(folder / "base", folder / "quantised")
    tensors = load_file(folder / "quantised" / "model.safetensors")
    section = json.loads((folder / "quantised" / "config.json").read_text())["quantization_config"]
    return SimpleNamespace(tensors=tensors, section=section, values=variant.values(folder / "quantised"))


def test_rows_have_the_oracles_values_and_every_tensor_has_its_weight(checkpoint: SimpleNamespace) -> None:
    tensors, found = checkpoint.tensors, weights(checkpoint.tensors, checkpoint.section)
    assert FORMAT.matches(checkpoint.section)
    claimed = {part.name for weight in found.values() for part in weight.quantization.parts.values()}
    cache = (".k_scale", ".v_scale")  # of no weight
    parts_of = {name for name, t in tensors.items() if t.dtype == E4M3 or "_scale" in name}
    assert claimed == {name for name in parts_of if not name.endswith(cache)}
    for name, weight in found.items():
        expected, out = checkpoint.values[name], weight.shape[0]
        assert weight.shape == expected.shape
        for start, stop in ((0, out), (0, 1), (63, min(65, out)), (5, 5), (out - 3, out), (31, out - 1)):
            rows = dequantize(weight, tensors, start, stop)
            assert rows.dtype == torch.float32
            assert torch.equal(rows, expected[start:stop]), (name, start, stop)
        assert torch.equal(tensors[name].view(torch.uint8), parts(weight, tensors)["codes"].view(torch.uint8))


def test_blocks_larger_than_the_weight_take_no_memory() -> None:
    tensors = {NAME: random_codes(6, 10), f"{NAME}_scale_inv": random_scales(1, 1)}
    weight = weights(tensors, BLOCKS | {"weight_block_size": [1 << 40, 1 << 40]})[NAME]
    values = dequantize(weight, tensors)
    assert torch.equal(values, tensors[NAME].float() * tensors[f"{NAME}_scale_inv"])
    assert FORMAT.quantize(values, logical(weight))["codes"].shape == (6, 10)


def _measured(weight: Weight) -> str:
    return next(p.name for label, p in weight.quantization.parts.items() if label not in ("codes", "scale"))


def test_requantising_gives_the_same_codes_and_values(checkpoint: SimpleNamespace) -> None:
    found = weights(checkpoint.tensors, checkpoint.section)
    static = [w for w in found.values() if w.quantization.parts.keys() - {"codes", "scale"}]
    assert bool(static) == (
        checkpoint.section.get("activation_scheme") == "static" or "quant_algo" in checkpoint.section
    )
    for weight in found.values():
        reason = FORMAT.refusal(logical(weight))
        assert reason == (f"{_measured(weight)} is not computed from weights" if weight in static else None)
    for name, weight in found.items():
        if weight not in static:
            new = FORMAT.quantize(dequantize(weight, checkpoint.tensors), logical(weight))
            old = parts(weight, checkpoint.tensors)
            assert {k: (t.dtype, t.shape) for k, t in new.items()} == {k: (t.dtype, t.shape) for k, t in old.items()}
            again = dequantize(weight, {weight.quantization.parts[k].name: t for k, t in new.items()})
            torch.testing.assert_close(again, checkpoint.values[name], rtol=1e-6, atol=0)
            if not weight.quantization.settings["power"]:  # a block of small values may get half the scale
                assert torch.equal(new["codes"].view(torch.uint8), old["codes"].view(torch.uint8)), name


@pytest.mark.parametrize("codes_dtype", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, E8M0, torch.uint8])
def test_blocks_of_any_shape_and_scales_of_any_dtype(codes_dtype: torch.dtype, dtype: torch.dtype) -> None:
    codes, scales = random_codes(3, 75, 130, dtype=codes_dtype), random_scales(3, 3, 3, dtype=dtype)
    tensors = {"m.experts.gate_up_proj": codes, "m.experts.gate_up_proj_scale_inv": scales}
    tensors |= {NAME: codes[0], f"{NAME}_scale_inv": scales[0]}
    section = BLOCKS | ({"scale_fmt": "ue8m0"} if dtype in (E8M0, torch.uint8) else {})
    found = weights(tensors, section)
    number = (scales.view(torch.uint8).float() - 127).exp2() if dtype in (E8M0, torch.uint8) else scales.float()
    spread = torch.stack([torch.kron(one, torch.ones(32, 64))[:75, :130] for one in number])
    expected = codes.float() * spread
    assert torch.equal(dequantize(found["m.experts.gate_up_proj"], tensors, 1, 3), expected[1:])
    assert torch.equal(dequantize(found[NAME], tensors, 31, 66), expected[0, 31:66])


def test_experts_with_one_scale_each_or_one_for_gate_and_one_for_up() -> None:
    codes = random_codes(2, 6, 5)
    section = PLAIN | {"weight_block_size": None, "activation_scheme": "dynamic"}
    for shape in ((2,), (2, 1, 1), (2, 2, 1)):
        scales = random_scales(*shape)
        tensors = {"m.experts.gate_up_proj": codes, "m.experts.gate_up_proj_scale_inv": scales}
        tensors["m.experts.gate_up_proj_activation_scale"] = torch.ones(2)
        (weight,) = weights(tensors, section).values()
        spread = scales.reshape(2, -1, 1).repeat_interleave(6 // max(1, scales.numel() // 2), 1)
        assert torch.equal(dequantize(weight, tensors, 1, 2), (codes.float() * spread)[1:])
        assert set(weight.quantization.parts) == {"codes", "scale", "activation"}


@pytest.mark.parametrize("shape", [(96, 192), (2, 64, 128)])
@pytest.mark.parametrize("fmt", ["float", "ue8m0"])
def test_quantises_as_transformers_does(shape: tuple[int, ...], fmt: str) -> None:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(3)) * 0.02
    values[..., :32, 64:128] = 0  # a block of zeros
    values[..., 0, 0] = 40.0
    config = FineGrainedFP8Config(weight_block_size=(32, 64), scale_fmt=fmt)
    library = Fp8Quantize(SimpleNamespace(quantization_config=config))._quantize_one("m.experts.up_proj", values)
    (weight,) = weights(library, BLOCKS | {"scale_fmt": fmt}).values()
    ours = FORMAT.quantize(values, logical(weight))
    assert torch.equal(ours["codes"].view(torch.uint8), library["m.experts.up_proj"].view(torch.uint8))
    assert torch.equal(ours["scale"].float(), library["m.experts.up_proj_scale_inv"].float())
    back = Fp8Dequantize(None)._dequantize_one(ours["codes"], ours["scale"], torch.float32)
    assert torch.equal(back[..., :32, 64:128], torch.zeros_like(back[..., :32, 64:128]))
    assert FORMAT.check(logical(weight), ours) is None  # no zeros, all finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, E8M0, torch.uint8])
@pytest.mark.parametrize("codes_dtype", [E4M3, E5M2])
def test_new_weights_are_within_half_a_step(dtype: torch.dtype, codes_dtype: torch.dtype) -> None:
    """Blocks at the edges, tiny and huge values, scales of any dtype: 3 or 2 bits after the leading one."""
    values = torch.randn(75, 130, generator=torch.Generator().manual_seed(4))
    values[:32, :64] *= 1e-12 if dtype != torch.float16 else 1
    values[32:64, :64] *= 1e6
    values[64:, 128:] = 0
    tensors = {NAME: torch.zeros(75, 130, dtype=codes_dtype), f"{NAME}_scale_inv": random_scales(3, 3, dtype=dtype)}
    (weight,) = weights(tensors, BLOCKS | {"scale_fmt": "ue8m0" if dtype in (E8M0, torch.uint8) else "float"}).values()
    new = FORMAT.quantize(values, logical(weight))
    assert (new["codes"].dtype, new["scale"].dtype, new["scale"].shape) == (codes_dtype, dtype, (3, 3))
    assert FORMAT.check(logical(weight), new) is None
    again = dequantize(weight, {NAME: new["codes"], f"{NAME}_scale_inv": new["scale"]})
    largest = torch.tensor([[block.abs().max() for block in band.split(64, 1)] for band in values.split(32)])  # (3, 3)
    largest = torch.kron(largest, torch.ones(32, 64))[:75, :130]
    step = 2**-4 if codes_dtype == E4M3 else 2**-3
    assert ((again - values).abs() <= 1.02 * step * values.abs() + 2**-15 * largest).all()
    assert torch.equal(again[64:, 128:], torch.zeros(11, 2))


@pytest.mark.parametrize(("value", "dtype"), [(1e-40, torch.float32), (1e-37, torch.bfloat16), (1e-5, torch.float16)])
def test_blocks_too_small_for_their_scale_count_as_zeros(value: float, dtype: torch.dtype) -> None:
    tensors = {NAME: torch.zeros(2, 2, dtype=E4M3), f"{NAME}_scale_inv": torch.ones(1, 1, dtype=dtype)}
    (weight,) = weights(tensors, BLOCKS).values()
    new = FORMAT.quantize(torch.full((2, 2), value), logical(weight))
    assert torch.equal(new["scale"], torch.ones(1, 1, dtype=dtype))
    assert torch.equal(new["codes"].float(), torch.zeros(2, 2))


def test_values_past_the_largest_code_become_it() -> None:
    """A scale that its dtype rounds down."""
    tensors = {NAME: torch.zeros(1, 1, dtype=E4M3), f"{NAME}_scale_inv": torch.ones(1, 1, dtype=torch.float16)}
    (weight,) = weights(tensors, BLOCKS).values()
    assert FORMAT.quantize(torch.full((1, 1), 3.2e-5), logical(weight))["codes"].float().item() == 448


def test_reads_no_more_than_the_rows() -> None:
    rows, columns = 1 << 24, 1 << 14  # a terabyte in float32
    codes, scales = torch.ones(1).to(E4M3).expand(rows, columns), torch.ones(1).expand(rows // 32, columns // 64)
    tensors = {NAME: codes, f"{NAME}_scale_inv": scales}
    (weight,) = weights(tensors, BLOCKS).values()
    assert torch.equal(dequantize(weight, tensors, rows - 33, rows - 31), torch.ones(2, columns))


def good() -> dict[str, torch.Tensor]:
    return {NAME: random_codes(64, 128), f"{NAME}_scale_inv": random_scales(2, 2)}


@pytest.mark.parametrize(
    ("change", "section", "message"),
    [
        ({f"{NAME}_scale_inv": None}, {}, f"{NAME}_scale_inv, which belongs to {NAME}, is missing"),
        ({NAME: None}, {}, f"{NAME}, which belongs to {NAME}_scale_inv, is missing"),
        ({NAME: torch.zeros(64, 128, dtype=torch.int8)}, {}, f"{NAME}: unexpected dtype"),
        ({f"{NAME}_scale_inv": torch.ones(2, 2, dtype=torch.int8)}, {}, f"{NAME}_scale_inv: unexpected dtype"),
        ({f"{NAME}_scale_inv": torch.ones(2, 2, dtype=torch.uint8)}, {}, f"{NAME}_scale_inv: unexpected dtype"),
        ({f"{NAME}_scale_inv": torch.ones(4, 1)}, {}, f"{NAME}_scale_inv does not fit {NAME}"),
        ({f"{NAME}_scale_inv": torch.ones(())}, {}, f"{NAME}_scale_inv does not fit {NAME}"),
        ({}, {"weight_block_size": None}, f"{NAME}_scale_inv does not fit {NAME}"),
        ({}, {"weight_block_size": [64, 32]}, f"{NAME}_scale_inv does not fit {NAME}"),
        ({}, {"weight_block_size": [32]}, "malformed 'weight_block_size'"),
        ({}, {"weight_block_size": [32, 0]}, "malformed 'weight_block_size'"),
        ({}, {"weight_block_size": 32}, "malformed 'weight_block_size'"),
        ({}, {"fmt": "e3m4"}, "(?s)unknown 'fmt'.*got:.*e3m4"),
        ({}, {"scale_fmt": "int"}, "unknown 'scale_fmt'"),
        ({}, {"expert_dtype": "fp4"}, "unknown 'expert_dtype'"),
        ({}, {"activation_scheme": "per_head"}, "unknown 'activation_scheme'"),
        ({}, {"activation_scheme": "static"}, f"{MODULE}activation_scale, which belongs to {NAME}, is missing"),
        ({f"{MODULE}activation_scale": torch.ones(3)}, {}, f"{MODULE}activation_scale does not fit {NAME}"),
        ({"n.weight": torch.ones(3).to(E4M3)}, {}, "n.weight: unexpected shape"),
        ({}, {"quant_method": "fbgemm_fp8"}, f"{NAME}_scale, which belongs to {NAME}, is missing"),
        ({f"{NAME}_scale": torch.ones(1)}, {"quant_method": "fbgemm_fp8"}, f"{NAME}_scale does not fit {NAME}"),
        ({f"{NAME}_scale": torch.ones(64, 1)}, {"quant_method": "modelopt"}, f"{NAME}_scale does not fit {NAME}"),
    ],
)  # fmt: skip
def test_refuses(change: dict[str, torch.Tensor | None], section: dict, message: str) -> None:
    weights(good(), BLOCKS)
    tensors = {name: tensor for name, tensor in (good() | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        weights(tensors, BLOCKS | section)


def test_other_methods_are_not_ours() -> None:
    assert not FORMAT.matches({"quant_method": "modelopt", "quant_algo": "NVFP4"})
    assert not FORMAT.matches({"quant_method": "compressed-tensors", "format": "float-quantized"})


def test_without_a_block_size_blocks_are_as_transformers_takes_them() -> None:
    tensors = {NAME: random_codes(129, 257), f"{NAME}_scale_inv": random_scales(2, 3)}
    (weight,) = weights(tensors, {"quant_method": "fp8"}).values()
    assert weight.quantization.settings["block"] == [128, 128]
    tensors[f"{NAME}_scale_inv"] = random_scales(129, 9, dtype=torch.uint8)
    (weight,) = weights(tensors, {"quant_method": "mxfp8"}).values()
    assert weight.quantization.settings == {"block": [1, 32], "power": True}


@pytest.mark.parametrize(
    ("scales", "problem"),
    [
        (torch.tensor([[1.0, float("nan")]]), "holds NaN"),
        (torch.tensor([[1.0, float("inf")]]), "holds infinity"),
        (torch.tensor([[1.0, 0.0]]), "holds zeros"),
        (torch.tensor([[0, 255]], dtype=torch.uint8), "holds NaN"),
        (torch.tensor([[0, 254]], dtype=torch.uint8), None),
        (torch.tensor([[0, 255]], dtype=torch.uint8).view(E8M0), "holds NaN"),
    ],
)
def test_check(scales: torch.Tensor, problem: str | None) -> None:
    tensors = {NAME: random_codes(32, 128), f"{NAME}_scale_inv": scales}
    (weight,) = weights(tensors, BLOCKS | {"scale_fmt": "ue8m0"}).values()
    assert FORMAT.check(logical(weight), parts(weight, tensors)) == (problem and (f"{NAME}_scale_inv", problem))


def test_exceptions_as_loaders_read_them() -> None:
    modules = ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.experts.0.up_proj",
               "model.layers.1.mlp.experts.1.up_proj", "model.layers.1.mlp.shared_experts.up_proj"]  # fmt: skip
    section = FORMAT.except_modules(BLOCKS, modules, ["lm_head"])
    named = section["modules_to_not_convert"]
    assert section == BLOCKS | {"modules_to_not_convert": named} and len(named) == 4 and named[0] == "lm_head"
    for module in ("self_attn.q_proj", "mlp.experts", "mlp.experts.0.up_proj", "mlp.shared_experts.up_proj"):
        assert not should_convert_module(f"model.layers.1.{module}", named)
        assert should_convert_module(f"model.layers.11.{module}", named)
    listed = FORMAT.except_modules(
        BLOCKS | {"modules_to_not_convert": ["a"], "ignored_layers": ["b"]}, modules[:1], ["c"]
    )
    assert listed["modules_to_not_convert"] == ["a", modules[0]] and listed["ignored_layers"] == ["b", modules[0]]
    listed = FORMAT.except_modules(PLAIN | {"ignored_layers": ["b"]}, modules[:1], ["c"])
    assert listed == PLAIN | {"ignored_layers": ["b", modules[0]]}
    modelopt = {"quant_method": "modelopt", "quant_algo": "FP8"}
    for key in ("ignore", "exclude_modules"):
        listed = FORMAT.except_modules(modelopt | {key: ["lm_head"]}, modules[:1], ["c"])
        assert listed == modelopt | {key: ["lm_head", modules[0]]}
