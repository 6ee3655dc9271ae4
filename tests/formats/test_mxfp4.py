"""MXFP4 beyond what all formats promise: the extremes of exponents, rounding, refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from makers.mxfp4 import quantise as by_specification
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors
from transformers.quantizers.quantizers_utils import should_convert_module

from deus_merge.checkpoint.formats.base import Weight
from deus_merge.checkpoint.formats.mxfp4 import FORMAT
from deus_merge.core.errors import CheckpointError
from deus_merge.core.tensors import StoredTensor
from deus_merge.core.units import stored_dtypes

NAME = "model.layers.1.mlp.experts.gate_up_proj"
SECTION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def weights(tensors: dict[str, torch.Tensor]) -> dict[str, Weight]:
    codes = stored_dtypes()
    stored = {
        name: StoredTensor(name, codes[t.dtype], tuple(t.shape), Path("model.safetensors"), 0, t.nbytes)
        for name, t in tensors.items()
    }
    return {weight.name: weight for weight in FORMAT.weights(stored, SECTION, tensors.__getitem__)}


def weight_of(blocks: torch.Tensor, scales: torch.Tensor) -> StoredTensor:
    (weight,) = weights({f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}).values()
    return StoredTensor(weight.name, "BF16", weight.shape, Path("x"), 0, 0, True, weight.quantization)


def random_parts(experts: int = 3, out: int = 7, groups: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (experts, out, groups, 16), generator=generator)
    scales = torch.randint(1, 253, (experts, out, groups), generator=generator)
    return blocks.to(torch.uint8), scales.to(torch.uint8)


def dequantize(blocks: torch.Tensor, scales: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
    stop = len(blocks) if stop is None else stop
    return FORMAT.dequantize(weight_of(blocks, scales), {"codes": blocks, "scale": scales}, start, stop)


def test_values_are_transformers_own_at_every_byte_and_exponent() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(255, 1, 1, 1)  # every byte
    scales = torch.arange(255, dtype=torch.uint8).reshape(255, 1, 1).repeat(1, 1, 16)  # every exponent
    ours, theirs = dequantize(blocks, scales), convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    assert torch.equal(ours, theirs) and torch.equal(ours.signbit(), theirs.signbit())
    assert ours[0, 2, 0] == 0.5 * 2.0**-127 != 0  # code 1 with exponent 0
    assert ours[127, 2:4, 0].tolist() == [0.5, 0.0]  # byte 1: the lower half is first


def test_experts_and_more_outputs_than_are_converted_at_once() -> None:
    blocks, scales = random_parts(out=1031)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert theirs.shape == (3, 64, 1031) == weight_of(blocks, scales).shape
    for start, stop in ((0, 3), (1, 2), (2, 3), (1, 1)):
        assert torch.equal(dequantize(blocks, scales, start, stop), theirs[start:stop])


def test_reads_no_more_than_the_experts() -> None:
    blocks = torch.full((1,), 0x22, dtype=torch.uint8).expand(1 << 30, 2, 2, 16)
    scales = torch.full((1,), 127, dtype=torch.uint8).expand(1 << 30, 2, 2)
    assert torch.equal(dequantize(blocks, scales, (1 << 30) - 2, (1 << 30) - 1), torch.ones(1, 64, 2))


def test_published_blocks_survive_requantising() -> None:
    values = torch.randn(2, 96, 5, generator=torch.Generator().manual_seed(1)) * torch.logspace(-20, 10, 5)
    blocks, scales = by_specification(values)
    new = FORMAT.quantize(dequantize(blocks, scales), weight_of(blocks, scales))
    assert torch.equal(new["codes"], blocks) and torch.equal(new["scale"], scales)
    blocks, scales = random_parts()
    blocks[..., 0] = 0x87  # the largest value and a negative zero
    new = FORMAT.quantize(dequantize(blocks, scales), weight_of(blocks, scales))
    assert torch.equal(new["codes"], blocks) and torch.equal(new["scale"], scales)


def test_quantises_to_the_nearest_even_code_with_the_smallest_scale_that_holds_all() -> None:
    """Against a search over all codes in exact arithmetic."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    group = torch.cat([ties, -ties, torch.linspace(-6, 6, 16)])
    small = torch.full((32,), 1e-30)
    wide = torch.linspace(-1, 1, 32) * 6.0001  # needs the next scale
    values = torch.stack([group * 2.0**-9, small, torch.zeros(32), wide], -1)[None]  # (1, 32, 4)
    blocks, scales = random_parts(1, 4, 1)
    new = FORMAT.quantize(values, weight_of(blocks, scales))
    expected = [math.ceil(math.log2(float(values[0, :, i].abs().max()) / 6)) + 127 for i in (0, 1, 3)]
    assert new["scale"][0, [0, 1, 3], 0].tolist() == expected
    codes = torch.stack([new["codes"] & 15, new["codes"] >> 4], -1).flatten(-2)[0, :, 0]  # (4, 32)
    for i in (0, 1, 3):
        for value, code in zip(values[0, :, i].tolist(), codes[i].tolist(), strict=True):
            scaled = value / 2.0 ** (int(new["scale"][0, i, 0]) - 127)
            distance = {c: abs(FP4_VALUES[c] - scaled) for c in range(16) if (c >= 8) == (scaled < 0)}
            nearest = min(distance.values())
            assert code == min((c for c in distance if distance[c] == nearest), key=lambda c: c % 2), (value, code)
    again = dequantize(new["codes"], new["scale"])
    assert torch.equal(again[0, :, 2], torch.zeros(32)) and new["scale"][0, 2, 0] == 0  # as triton_kernels
    assert FORMAT.check(weight_of(blocks, scales), new) is None


def test_extreme_values_keep_finite_scales() -> None:
    values = torch.zeros(1, 96, 1)
    values[0, :32] = 1e38
    values[0, 32:64] = 1e-42
    values[0, 64] = -1e-45
    blocks, scales = random_parts(1, 1, 3)
    new = FORMAT.quantize(values, weight_of(blocks, scales))
    assert new["scale"][0, 0, 0] == 251 and (new["scale"][0, 0, 1:] <= 1).all()
    again = dequantize(new["codes"], new["scale"])
    assert again.isfinite().all() and (again[0, :32] > 8e37).all() and (again[0, 32:].abs() < 2**-120).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{NAME}_scales": None}, f"{NAME}_scales, which belongs to {NAME}_blocks, is missing"),
        ({f"{NAME}_blocks": None}, f"{NAME}_blocks, which belongs to {NAME}_scales, is missing"),
        ({f"{NAME}_blocks": torch.zeros(3, 7, 2, 16)}, f"{NAME}_blocks: unexpected dtype"),
        ({f"{NAME}_blocks": torch.zeros(3, 7, 2, 8, dtype=torch.uint8)}, f"{NAME}_blocks: unexpected shape"),
        ({f"{NAME}_blocks": torch.zeros(3, 7, 32, dtype=torch.uint8)}, f"{NAME}_blocks: unexpected shape"),
        ({f"{NAME}_scales": torch.zeros(3, 7, 2)}, f"{NAME}_scales: unexpected dtype"),
        ({f"{NAME}_scales": torch.zeros(3, 2, 7, dtype=torch.uint8)}, f"{NAME}_scales does not fit {NAME}_blocks"),
    ],
)  # fmt: skip
def test_refuses(change: dict[str, torch.Tensor | None], message: str) -> None:
    blocks, scales = random_parts()
    tensors = {f"{NAME}_scales": scales, f"{NAME}_blocks": blocks, f"{NAME}_bias": torch.zeros(3, 7)}
    (weight,) = weights(tensors).values()
    assert {part.name for part in weight.quantization.parts.values()} == {f"{NAME}_blocks", f"{NAME}_scales"}
    with pytest.raises(CheckpointError, match=message):
        weights({name: tensor for name, tensor in (tensors | change).items() if tensor is not None})


def test_check_and_exceptions() -> None:
    blocks, scales = random_parts()
    scales[0, 0, 0] = 0  # a power of two like any other
    weight = weight_of(blocks, scales)
    assert FORMAT.check(weight, {"codes": blocks, "scale": scales}) is None
    scales[2, 6, 1] = 255
    assert FORMAT.check(weight, {"codes": blocks, "scale": scales}) == (f"{NAME}_scales", "holds NaN")
    assert FORMAT.matches(SECTION) and not FORMAT.matches({"quant_method": "fp8"})
    named = FORMAT.except_modules(SECTION, ["model.layers.1.mlp.experts"], ["lm_head"])["modules_to_not_convert"]
    assert not should_convert_module("model.layers.1.mlp.experts", named)
    assert should_convert_module("model.layers.11.mlp.experts", named)
    assert named[:2] == SECTION["modules_to_not_convert"]
