"""bitsandbytes' formats: what the contract of all formats does not test."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from bitsandbytes import functional
from makers.bitsandbytes import values_4bit, values_8bit
from safetensors.torch import load_file, save_file
from tiny_float_models import write_float_model

from deus_merge.checkpoint.dequantized import DequantizedSource, dequantized
from deus_merge.checkpoint.formats.bitsandbytes_4bit import FORMAT as FOUR
from deus_merge.checkpoint.formats.bitsandbytes_8bit import FORMAT as EIGHT
from deus_merge.checkpoint.reader import Checkpoint
from deus_merge.core.errors import CheckpointError

NAME = "model.layers.1.mlp.up_proj.weight"
SECTIONS = {
    4: {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"},
    8: {"load_in_4bit": False, "load_in_8bit": True},
}
Tensors = dict[str, torch.Tensor]


def opened(folder: Path, tensors: Mapping[str, torch.Tensor], bits: int) -> DequantizedSource:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": SECTIONS[bits]}))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    source = dequantized(Checkpoint.open(folder))
    assert isinstance(source, DequantizedSource)
    return source


def four(
    shape: tuple[int, ...] = (37, 50), kind: str = "nf4", nested: bool = True, block: int = 64, storage=torch.uint8
) -> Tensors:
    """A weight as ``Linear4bit`` stores it, with a block of zeros."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values.view(-1)[block : 2 * block] = 0
    codes, state = functional.quantize_4bit(
        values, blocksize=block, compress_statistics=nested, quant_type=kind, quant_storage=storage
    )
    return {NAME: codes} | {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}


def eight(shape: tuple[int, int] = (37, 50)) -> Tensors:
    codes, scales, _ = functional.int8_vectorwise_quant(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    module = NAME.removesuffix(".weight")
    return {NAME: codes, f"{module}.SCB": scales, f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("shape", "kind", "nested", "block", "storage"),
    [
        ((37, 50), "nf4", True, 64, torch.uint8),  # blocks end inside of rows, and the last is not full
        ((38, 50), "fp4", False, 64, torch.bfloat16),
        ((5, 7), "nf4", False, 32, torch.uint8),  # rows begin inside of bytes, and the last byte has one code
        ((300, 256), "fp4", True, 64, torch.float32),  # more than one block of scales
        ((3, 40, 24), "nf4", True, 128, torch.uint8),  # experts in one tensor
    ],
)
def test_rows_of_4_bit_weights_are_as_bitsandbytes_dequantises_them(tmp_path, shape, kind, nested, block, storage):
    source = opened(tmp_path, four(shape, kind, nested, block, storage), 4)
    expected = values_4bit(tmp_path)[NAME]
    assert source.tensors[NAME].shape == shape
    for start, stop in ((0, shape[0]), (0, 1), (1, 3), (2, 2), (shape[0] - 2, shape[0])):
        assert torch.equal(source.slice(NAME, start, stop), expected[start:stop])


def test_rows_of_8_bit_weights_are_as_bitsandbytes_dequantises_them(tmp_path):
    source, expected = opened(tmp_path, eight(), 8), values_8bit(tmp_path)[NAME]
    for start, stop in ((0, 37), (5, 6), (36, 37), (4, 4)):
        assert torch.equal(source.slice(NAME, start, stop), expected[start:stop])


def test_old_8_bit_checkpoints_have_no_layout(tmp_path):
    tensors = eight()
    del tensors["model.layers.1.mlp.up_proj.weight_format"]
    source = opened(tmp_path, tensors, 8)
    assert torch.equal(source.read(NAME), values_8bit(tmp_path)[NAME])
    assert set(EIGHT.quantize(source.read(NAME), source.tensors[NAME])) == {"codes", "scales"}


def test_memory_is_bound_by_the_rows(tmp_path, monkeypatch):
    source, expected = opened(tmp_path, four((96, 1000)), 4), values_4bit(tmp_path)[NAME]
    read: list[int] = []
    lookup = torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select", lambda t, d, i: read.append(len(i)) or lookup(t, d, i))
    assert torch.equal(source.slice(NAME, 7, 8), expected[7:8])
    assert read and max(read) <= (1000 + 2 * 64) // 2  # bytes of codes: a row, and what its blocks have beside it


def state(**changes: object) -> Callable[[Tensors], object]:
    """Change the settings that a weight's tensor has in JSON; None removes one."""

    def change(tensors: Tensors) -> None:
        key = f"{NAME}.quant_state.bitsandbytes__nf4"
        found = json.loads(bytes(tensors[key].tolist())) | changes
        text = json.dumps({k: v for k, v in found.items() if v is not None})
        tensors[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: value})


STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(NAME), f"{NAME}, which belongs to"),
        (drop(f"{NAME}.absmax"), f"{NAME}.absmax, which belongs to {NAME}, is missing"),
        (drop(f"{NAME}.quant_map"), f"{NAME}.quant_map, which"),
        (drop(f"{NAME}.nested_absmax"), f"{NAME}.nested_absmax, which"),
        (drop(f"{NAME}.nested_quant_map"), f"{NAME}.nested_quant_map, which"),
        (drop(STATE), f"{NAME} needs one of these"),
        (put(STATE.replace("nf4", "fp4"), torch.zeros(2, dtype=torch.uint8)), f"{NAME} needs one of these"),
        (put(STATE, torch.zeros(9, dtype=torch.uint8)), f"{STATE} does not hold"),
        (put(STATE, torch.zeros(1, 9, dtype=torch.uint8)), f"{STATE} does not hold"),
        (put(STATE, torch.full((9999,), ord("["), dtype=torch.uint8)), f"{STATE} does not hold"),
        (put(STATE, torch.full((1 << 17,), ord(" "), dtype=torch.uint8)), "131072"),
        (put(NAME, torch.zeros(924, 1, dtype=torch.uint8)), f"{NAME} does not fit"),
        (put(NAME, torch.zeros(925, 1, dtype=torch.int32)), f"{NAME}: unexpected dtype"),
        (put(f"{NAME}.absmax", torch.zeros(28, dtype=torch.uint8)), f"{NAME}.absmax does not fit"),
        (put(f"{NAME}.absmax", torch.zeros(29)), f"{NAME}.absmax: unexpected dtype"),
        (put(f"{NAME}.nested_absmax", torch.zeros(2)), f"{NAME}.nested_absmax does not fit"),
        (put(f"{NAME}.nested_quant_map", torch.zeros(16)), f"{NAME}.nested_quant_map does not fit"),
        (put(f"{NAME}.quant_map", torch.zeros(16, dtype=torch.bfloat16)), f"{NAME}.quant_map: unexpected dtype"),
        (state(quant_type="fp4"), "unknown or missing quant_type"),
        (state(blocksize=48), "unknown or missing blocksize"),
        (state(blocksize=64.0), "unknown or missing blocksize"),
        (state(shape=None), "unknown or missing shape"),
        (state(nested_dtype="float16"), "unknown or missing nested_dtype"),
        (state(nested_offset=None), "unknown or missing nested_offset"),
        (state(nested_offset=float("nan")), "unknown or missing nested_offset"),
        (state(nested_offset=None, nested_blocksize=None, nested_dtype=None), f"{NAME}.absmax: unexpected dtype"),
    ],
)
def test_a_broken_4_bit_checkpoint_is_refused(tmp_path, change, message):
    tensors = four()
    change(tensors)
    with pytest.raises(CheckpointError) as error:
        opened(tmp_path, tensors, 4)
    assert message in str(error.value)


MODULE = NAME.removesuffix(".weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{MODULE}.SCB"), f"{MODULE}.SCB, which belongs to {NAME}, is missing"),
        (drop(NAME), f"{NAME}, which belongs to {MODULE}.SCB, is missing"),
        (put(NAME, torch.zeros(37, 50)), f"{NAME}: unexpected dtype"),
        (put(f"{MODULE}.SCB", torch.ones(50)), f"{MODULE}.SCB does not fit"),
        (put(f"{MODULE}.SCB", torch.ones(37).half()), f"{MODULE}.SCB: unexpected dtype"),
        (put(f"{MODULE}.weight_format", torch.tensor(2, dtype=torch.uint8)), "unsupported layout of codes"),
        (put(f"{MODULE}.weight_format", torch.zeros(1, dtype=torch.uint8)), f"{MODULE}.weight_format does not fit"),
    ],
)
def test_a_broken_8_bit_checkpoint_is_refused(tmp_path, change, message):
    tensors = eight()
    change(tensors)
    with pytest.raises(CheckpointError) as error:
        opened(tmp_path, tensors, 8)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("part", "bits", "nested"),
    [("absmax", 4, False), ("nested_absmax", 4, True), ("quant_map", 4, True), ("nested_quant_map", 4, True),
     ("SCB", 8, False)],
)  # fmt: skip
def test_scales_that_are_not_numbers_are_refused(tmp_path, part, bits, nested):
    tensors = four(nested=nested) if bits == 4 else eight()
    name = f"{NAME if bits == 4 else MODULE}.{part}"
    tensors[name][-1] = float("nan")
    source = opened(tmp_path, tensors, bits)
    with pytest.raises(CheckpointError, match=f"{name} holds NaN"):
        source.slice(NAME, 0, 1)


def test_zeros_among_the_values_of_codes_are_not_odd(tmp_path):
    source = opened(tmp_path, four(), 4)
    weight = source.tensors[NAME]
    assert weight.quantization is not None
    assert FOUR.check(weight, {k: source.stored.read(t.name) for k, t in weight.quantization.parts.items()}) is None


def test_8_bit_weights_are_quantised_as_bitsandbytes_does(tmp_path):
    source = opened(tmp_path, eight(), 8)
    like = source.tensors[NAME]
    again = EIGHT.quantize(source.read(NAME), like)
    assert torch.equal(again["codes"], source.stored.read(NAME)) and again["layout"] == 0
    values = torch.randn(37, 50, generator=torch.Generator().manual_seed(2))
    values[3, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])  # half to even
    codes, scales, _ = functional.int8_vectorwise_quant(values)
    made = EIGHT.quantize(values, like)
    assert torch.equal(made["codes"], codes) and torch.equal(made["scales"], scales)
    assert codes[3, :4].tolist() == [127, 0, 2, -2]


def test_rows_of_zeros_stay_zeros(tmp_path):
    source = opened(tmp_path, eight(), 8)
    like = source.tensors[NAME]
    values = torch.randn(37, 50)
    values[4], values[5] = 0, 1e-37  # 127 / 1e-37 is infinite in float32
    made = EIGHT.quantize(values, like)
    assert bool(torch.isfinite(made["scales"]).all()) and bool((made["scales"] > 0).all())
    back = EIGHT.dequantize(like, made, 0, 37)
    most = values.abs().amax(1, True).clamp_min(1e-36)
    assert not back[4].any() and bool(((back - values).abs() <= 1.001 * most / 254).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_modules_in_floating_point_load_in_transformers(tmp_path, bits):
    """One module is named and stored as it is; ``lm_head``, which is left out as long as none is named, stays so."""
    write_float_model("llama", tmp_path / "base")
    settings = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(tmp_path / "base", quantization_config=settings, device_map="cpu").save_pretrained(tmp_path / "made")
    weights = load_file(tmp_path / "made" / "model.safetensors")
    kept = {n: t for n, t in weights.items() if not n.startswith(MODULE)}
    save_file(kept | {NAME: load_file(tmp_path / "base" / "model.safetensors")[NAME]},
              tmp_path / "made" / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    format_ = FOUR if bits == 4 else EIGHT
    assert format_.matches(config["quantization_config"])
    config["quantization_config"] = format_.except_modules(config["quantization_config"], [MODULE], ["lm_head"])
    (tmp_path / "made" / "config.json").write_text(json.dumps(config))
    model = load(tmp_path / "made")
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    quantized = "Linear4bit" if bits == 4 else "Linear8bitLt"
    assert kinds[MODULE] == kinds["lm_head"] == "Linear"
    assert kinds[MODULE.replace("1", "2")] == kinds[MODULE.replace("up", "gate")] == quantized
    assert bool(torch.isfinite(model(torch.arange(8)[None]).logits).all())


def test_modules_that_vllm_fuses_are_named_as_it_asks_for_them():
    section = {"llm_int8_skip_modules": None}
    modules = ["model.layers.3.self_attn.q_proj", "model.layers.3.mlp.experts.0.up_proj", "model.layers.3.mlp.up_proj"]
    for format_ in (FOUR, EIGHT):
        named = format_.except_modules(section, modules, ["lm_head"])["llm_int8_skip_modules"]
        assert set(named) == {"lm_head", *modules, "model.layers.3.self_attn.qkv_proj", "model.layers.3.mlp.experts",
                              "model.layers.3.mlp.gate_up_proj"}  # fmt: skip
