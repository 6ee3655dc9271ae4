"""What holds for every format of quantised weights, over checkpoints as the formats' own libraries write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from quantized_checkpoints import VARIANTS
from safetensors.torch import load_file

from deus_merge.checkpoint import LoadOptions, open_source
from deus_merge.checkpoint.formats.registry import formats
from deus_merge.checkpoint.quantized import quantization
from deus_merge.core.units import torch_dtype

pytestmark = pytest.mark.parametrize("name", VARIANTS)
#: whose format quantises, but whose weights have parts that are not computed from values
MEASURED = {"fp8_tensor", "fp8_tensor_vllm", "fp8_modelopt", "ct_fp8_tensor", "ct_fp8_kv", "ct_int4_asymmetric",
            "ct_int4_ordered", "ct_nvfp4", "ct_mixed"}  # fmt: skip
TOKENS = torch.arange(1, 25).view(1, -1)


def source(folder):
    return open_source(str(folder), LoadOptions())


def format_of(folder):
    quantized = next(t.quantization for t in source(folder).tensors.values() if t.quantization)
    return formats()[quantized.format]


def stored(folder: Path) -> dict[str, bytes]:
    """Every stored tensor's bytes, with dtype and shape."""
    checkpoint = getattr(source(folder), "stored", source(folder))
    return {
        name: str((t.dtype, t.shape)).encode() + t.file.read_bytes()[t.offset : t.offset + t.nbytes]
        for name, t in checkpoint.tensors.items()
    }


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def recipe(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def passthrough(*parts) -> str:
    """A recipe of slices: (folder, first, end) each."""
    sources = (f"  - sources: [{{model: '{model}', layer_range: [{first}, {end}]}}]\n" for model, first, end in parts)
    return "merge_method: passthrough\nslices:\n" + "".join(sources)


@torch.no_grad()
def logits(folder) -> torch.Tensor:
    """As transformers computes them on a CPU, with the weights dequantised where that is how it computes there."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.bfloat16)
    return loaded.eval()(TOKENS).logits.float()


def assert_same_function(name, base, grown, mixed=False):
    if VARIANTS[name].loads and (VARIANTS[name].mixes or not mixed):
        assert torch.equal(logits(base), logits(grown))


def test_values(name, quantized, float_model):
    folder, variant = quantized(name), VARIANTS[name]
    read, expected = source(folder), variant.values(folder)
    found = {n for n, t in read.tensors.items() if t.quantization}
    assert found and found <= set(expected) <= set(read.tensors)
    original = load_file(float_model(variant.model) / "model.safetensors")
    for weight in found:
        assert read.tensors[weight].shape == tuple(expected[weight].shape)
        ours = read.read(weight)
        assert ours.dtype == torch.float32
        if variant.exact:
            assert torch.equal(ours, expected[weight].float()), weight
        else:
            assert torch.equal(ours.bfloat16(), expected[weight].bfloat16()), weight
        rows = len(ours)
        for start, stop in ((0, 1), (rows // 3, 2 * rows // 3 + 1), (rows - 1, rows), (1, 1)):
            assert torch.equal(read.slice(weight, start, stop), ours[start:stop])
        if weight in original:  # it is this weight, and not another one
            similarity = torch.cosine_similarity(ours.flatten(), original[weight].float().flatten(), dim=0)
            assert similarity > 0.8, weight


def test_copies_stay_byte_for_byte(name, quantized, run, tmp_path):
    base, out = quantized(name), tmp_path / "out"
    run("merge", recipe(tmp_path / "r.yml", passthrough((base, 0, 2), (base, 1, 3))), out)
    before, after = stored(base), stored(out)
    renamed = {}
    for key in after:
        number = next((i for i in range(4) if f".layers.{i}." in key), None)
        origin = None if number is None else (0, 1, 1, 2)[number]
        renamed[key] = key if number is None else key.replace(f".layers.{number}.", f".layers.{origin}.")
    assert {key: before[old] for key, old in renamed.items()} == after
    assert set(renamed.values()) == set(before)
    run("verify", out)
    same = tmp_path / "same"
    run("merge", recipe(tmp_path / "s.yml", f"merge_method: passthrough\nmodels: [{{model: '{base}'}}]\n"), same)
    assert stored(same) == before
    assert quantization(config_of(same)) == quantization(config_of(base))
    assert_same_function(name, base, same)


@pytest.mark.parametrize("preset", ["opt_deus", "llama_pro"])
def test_new_layers_in_floating_point(name, preset, quantized, run, tmp_path):
    base, out = quantized(name), tmp_path / "out"
    run("upscale", base, out, "--preset", preset, "--insert", "{after: [1]}")
    run("verify", out)
    before, after = stored(base), stored(out)
    for key in after:
        if ".layers.2." not in key:
            assert after[key] == before[key.replace(".layers.3.", ".layers.2.")], key
    grown = source(out)
    new = {key: tensor for key, tensor in grown.tensors.items() if ".layers.2." in key}
    assert not any(tensor.quantization for tensor in new.values())
    # A loader must be told of each of them, and of nothing that is quantised.
    section = quantization(config_of(out))
    assert section and format_of(base).name == format_of(out).name
    assert_same_function(name, base, out, mixed=True)
    if preset == "llama_pro":  # a copy of layer 1, rounded once
        expected = VARIANTS[name].values(base)
        for key, tensor in new.items():
            values, origin = grown.read(key).float(), key.replace(".layers.2.", ".layers.1.")
            if origin in expected and values.any():
                dtype = torch_dtype(tensor.dtype)
                assert dtype.itemsize == 2 and torch.equal(values, expected[origin].to(dtype).float())
    run("verify", out, "--strict")
    stripped = tmp_path / "stripped"
    run("strip", out, stripped)
    assert stored(stripped) == before and quantization(config_of(stripped)) == quantization(config_of(base))
    again = tmp_path / "again"
    run("upscale", out, again, "--preset", preset, "--insert", "{after: [0, 2]}")
    run("verify", again)
    assert_same_function(name, base, again, mixed=True)


def test_new_layers_in_the_format(name, quantized, run, tmp_path):
    base, out = quantized(name), tmp_path / "out"
    able = format_of(base).quantizes
    done = run("upscale", base, out, "--quantize-new", "--insert", "{after: [1]}", expect=None)
    if not able:
        assert done.code == 2 and f"cannot be quantised to {format_of(base).name}" in done.err and not out.exists()
        return
    if name in MEASURED:
        assert done.code == 2
        assert "quantize_new" in done.err and "new layers cannot be quantised like those" in done.err, done.err
        assert not list(tmp_path.iterdir())
        return
    assert done.code == 0, done.err
    run("verify", out)
    read, before = source(out), source(base)
    for key in (key for key in read.tensors if ".layers.2." in key):
        origin = before.tensors[key]
        assert bool(read.tensors[key].quantization) == bool(origin.quantization)
        if key.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            assert not read.read(key).any()
    assert ".layers.2." in str(quantization(config_of(base))) or config_of(out)["quantization_config"] == quantization(
        config_of(base)
    )
    assert_same_function(name, base, out)


def test_merges_compute_with_values(name, quantized, run, tmp_path):
    first, second, out = quantized(name), quantized(name, 1), tmp_path / "out"
    text = f"merge_method: linear\nparameters: {{weight: 0.5}}\nmodels: [{{model: '{first}'}}, {{model: '{second}'}}]\n"
    run("merge", recipe(tmp_path / "r.yml", text), out)
    run("verify", out)
    assert quantization(config_of(out)) is None
    a, b, merged = source(first), source(second), source(out)
    weights = [weight for weight in a.tensors if not weight.endswith("_scale")]  # but those of caches
    assert set(merged.tensors) == set(weights)
    for weight in weights:
        mean = (0.5 * a.read(weight).float() + 0.5 * b.read(weight).float()) / 1.0
        assert torch.equal(merged.read(weight).float(), mean.to(merged.read(weight).dtype).float()), weight


def test_dtype_writes_values(name, quantized, run, tmp_path):
    base, out = quantized(name), tmp_path / "out"
    text = f"merge_method: passthrough\ndtype: float32\nmodels: [{{model: '{base}'}}]\n"
    done = run("merge", recipe(tmp_path / "r.yml", text), out)
    assert "leave dtype out to keep their codes" in done.err
    run("verify", out)
    assert quantization(config_of(out)) is None and config_of(out)["dtype"] == "float32"
    values, read = load_file(out / "model.safetensors"), source(base)
    assert set(values) == {key for key in read.tensors if not key.endswith("_scale")}
    for key, tensor in values.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, read.read(key).float()), key
    transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    scaled = tmp_path / "scaled"
    scale = "parameters: {scale: [{filter: layers.1., value: 0.5}]}"
    text = f"merge_method: passthrough\n{scale}\nmodels: [{{model: '{base}'}}]\n"
    run("merge", recipe(tmp_path / "s.yml", text), scaled)
    run("verify", scaled)
    halved = source(scaled)
    for key in read.tensors:
        factor = 0.5 if ".layers.1." in key and not key.endswith("_scale") else 1.0
        expected = (factor * read.read(key).float()).to(torch_dtype(halved.tensors[key].dtype))
        assert halved.tensors[key].quantization or torch.equal(halved.read(key), expected), key


def test_beside_a_float_model(name, quantized, float_model, run, tmp_path):
    """Layers of a quantised and of a plain model in one output, with either's config."""
    base, other = quantized(name), float_model(VARIANTS[name].model, 1)
    for first, second, keeps in ((base, other, True), (other, base, False)):
        out = tmp_path / str(keeps)
        text = passthrough((first, 0, 2), (second, 1, 3))
        if any(n.endswith("k_scale") for n in source(base).tensors):  # the layers of the other model have none
            assert "k_scale" in run("merge", recipe(tmp_path / f"{keeps}.yml", text), out, expect=2).err
            continue
        run("merge", recipe(tmp_path / f"{keeps}.yml", text), out)
        run("verify", out)
        assert bool(quantization(config_of(out))) == keeps
        read = source(out)
        assert any(t.quantization for k, t in read.tensors.items() if ".layers.1." in k) == keeps
        assert not any(t.quantization for k, t in read.tensors.items() if ".layers.3." in k)
        if (VARIANTS[name].loads and VARIANTS[name].mixes) or not keeps:
            assert logits(out).isfinite().all()
