"""Quantised weights of formats that nobody described are copied byte for byte; whatever would compute with their codes
is refused by name. Those of known formats: tests/formats."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import make_model

from deus_merge.checkpoint import Checkpoint
from deus_merge.core.errors import CheckpointError


def fp8(name, weight):
    return {name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.rand(2, 2)}


def fp8_per_tensor(name, weight):
    scales = {f"{name}_scale": torch.rand(()), f"{name[: -len('weight')]}input_scale": torch.rand(())}
    return {name: weight.to(torch.float8_e4m3fn), **scales}


def fp8_without_scales(name, weight):
    return {name: weight.to(torch.float8_e4m3fn)}


def bf16_scale(name, weight):
    return {name: weight.to(torch.bfloat16), f"{name}_scale": torch.rand(len(weight), 1)}


def hqq(name, weight):
    module = name[: -len(".weight")]
    parts = {"W_q": torch.zeros(len(weight), 4, dtype=torch.uint8), "scale": torch.rand(8), "zero": torch.rand(8)}
    return {f"{module}.{part}": tensor for part, tensor in parts.items()}


def quanto(name, weight):
    return {f"{name}._data": weight.to(torch.int8), f"{name}._scale": torch.rand(len(weight), 1)}


def int8_rows(name, weight):
    module = name[: -len(".weight")]
    return {name: weight.to(torch.int8), f"{module}.SCB": torch.rand(len(weight))}


def words(name, weight):
    module = name[: -len(".weight")]
    codes, groups = torch.zeros(4, len(weight), dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    tensors = {"qweight": codes, "qzeros": codes[:1].clone(), "scales": torch.rand(1, len(weight)), "g_idx": groups}
    return {f"{module}.{part}": tensor for part, tensor in tensors.items()}


#: format -> how a weight is stored, the config's section, model_type, the part that a message names
FORMATS = {
    "fp8 of no config": (fp8, None, "llama", "weight_scale_inv"),
    "fp8 per tensor": (fp8_per_tensor, {"quant_method": "new8"}, "llama", "(new8), together with"),
    "fp8 without scales": (fp8_without_scales, {"quant_method": "new8"}, "llama", "proj.weight is part of a quantised"),
    "a scale beside bfloat16": (bf16_scale, {"quant_method": "bitnet"}, "llama", "weight_scale"),
    "hqq": (hqq, {"quant_method": "hqq"}, "mystery", "quantised weight (hqq)"),
    "quanto": (quanto, {"quant_method": "quanto"}, "mystery", "quantised weight (quanto)"),
    "int8": (int8_rows, {"quant_method": "eetq"}, "llama", "SCB"),
    "auto-round": (words, {"quant_method": "auto-round"}, "mystery", "part of a quantised weight (auto-round)"),
}
RECIPES = {
    "linear": "merge_method: linear\nparameters: {weight: 0.5}\nmodels: [{model: a}, {model: b}]\n",
    "dtype": "merge_method: passthrough\nmodels: [{model: a}]\ndtype: float16\n",
    "scale": "merge_method: passthrough\nmodels: [{model: a}]\nparameters: {scale: [{filter: proj, value: 0.5}]}\n",
    "align": "merge_method: karcher\nalign: {alignment: symmetry}\nmodels: [{model: a}, {model: b}]\n",
}
COPY = "merge_method: passthrough\nslices:\n" + "".join(
    f"  - sources: [{{model: {model}, layer_range: [{first}, {last}]}}]\n"
    for model, first, last in (("a", 0, 2), ("b", 1, 2))
)


@pytest.fixture(scope="module", params=FORMATS)
def models(request, tmp_path_factory):
    """A folder with two models whose projections are quantised, and the part that messages name."""
    root = tmp_path_factory.mktemp("quantised")
    store, section, model_type, named = FORMATS[request.param]
    for seed, name in enumerate("ab"):
        folder = make_model(root / name, layers=2, seed=seed)
        tensors = load_file(folder / "model.safetensors")
        for key in [k for k in tensors if "proj" in k]:
            tensors |= store(key, tensors.pop(key))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
        config |= {"quantization_config": section} if section else {}
        (folder / "config.json").write_text(json.dumps(config))
    return root, named


def test_codes_are_copied_and_nothing_else(run, models, tmp_path, monkeypatch):
    root, named = models
    monkeypatch.chdir(root)
    recipe, out = tmp_path / "recipe.yml", tmp_path / "out"
    for name, text in RECIPES.items():
        recipe.write_text(text)
        done = run("merge", recipe, out, expect=2)
        if name != "align":  # which also needs a description of every tensor
            assert named in done.err and "part of a quantised weight" in done.err, done.err
        assert not out.exists()
    recipe.write_text(COPY)
    run("merge", recipe, out)
    written, config = Checkpoint.open(out), json.loads((out / "config.json").read_text())
    sources = {name: Checkpoint.open(root / name) for name in "ab"}
    assert config.get("quantization_config") == sources["a"].config.get("quantization_config")
    for name, tensor in written.tensors.items():
        source, old = ("b", name.replace("layers.2.", "layers.1.")) if "layers.2." in name else ("a", name)
        assert tensor.dtype == sources[source].tensors[old].dtype
        assert bytes(_raw(written, name)) == bytes(_raw(sources[source], old))


def _raw(checkpoint: Checkpoint, name: str) -> bytes:
    tensor = checkpoint.tensors[name]
    return tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]


def test_other_ways_of_quantising_do_not_mix(run, models, tmp_path, monkeypatch):
    root = tmp_path / "mixed"
    shutil.copytree(models[0], root)
    monkeypatch.chdir(root)
    config = json.loads((root / "b/config.json").read_text())
    config["quantization_config"] = {**config.get("quantization_config", {}), "group_size": 77}
    (root / "b/config.json").write_text(json.dumps(config))
    (tmp_path / "recipe.yml").write_text(COPY)
    done = run("merge", tmp_path / "recipe.yml", tmp_path / "out", expect=2)
    assert "they are quantised in other ways" in done.err and "'group_size': 77" in done.err, done.err


@pytest.mark.parametrize("kind", ["int8", "auto-round"])
def test_packed_weights_and_adapters_are_refused_by_name(run, tmp_path, kind):
    """Packed weights in a described family, whose layers seem to lack their tensors; an adapter to either."""
    store, section, *_ = FORMATS[kind]
    method = section["quant_method"]
    folder = make_model(tmp_path / "model", layers=1)
    tensors = load_file(folder / "model.safetensors")
    for key in [k for k in tensors if "proj" in k]:
        tensors |= store(key, tensors.pop(key))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": section}
    (folder / "config.json").write_text(json.dumps(config))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4}))
    prefix = "base_model.model.model.layers.0.self_attn.o_proj.lora_"
    save_file({f"{prefix}A.weight": torch.rand(2, 32), f"{prefix}B.weight": torch.rand(32, 2)},
              adapter / "adapter_model.safetensors")  # fmt: skip
    (tmp_path / "recipe.yml").write_text(f"merge_method: passthrough\nmodels: [{{model: {folder}+{adapter}}}]\n")
    done = run("merge", tmp_path / "recipe.yml", tmp_path / "out", expect=2)
    assert f"it is quantised ({method})" in done.err, done.err
    if kind == "auto-round":
        done = run("upscale", folder, tmp_path / "out", expect=2)
        assert f"the weights are quantised ({method}), and packed" in done.err and "qweight" in done.err, done.err
    assert not (tmp_path / "out").exists()


def test_every_dtype_of_safetensors_is_copied(run, tmp_path):
    """Elements of less than a byte lie next to each other."""
    folder = make_model(tmp_path / "model", layers=1)
    sizes = {"F4": (3, 8, 12), "F6_E2M3": (2, 4, 6), "F6_E3M2": (2, 4, 6), "F8_E8M0": (5, 1, 5),
             "F8_E4M3FNUZ": (1, 4, 4), "F8_E5M2FNUZ": (2, 2, 4), "C64": (2, 1, 16)}  # fmt: skip
    entries, data = {}, b""
    for code, (rows, columns, size) in sizes.items():
        entries[f"x.{code}"] = {"dtype": code, "shape": [rows, columns], "data_offsets": [len(data), len(data) + size]}
        data += bytes(range(size))
    header = json.dumps(entries).encode()
    (folder / "more.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    index = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    index |= dict.fromkeys(entries, "more.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {folder}}}]\n")
    run("merge", recipe, tmp_path / "out")
    written = Checkpoint.open(tmp_path / "out")
    for code, (rows, columns, size) in sizes.items():
        tensor = written.tensors[f"x.{code}"]
        assert (tensor.dtype, tensor.shape, _raw(written, f"x.{code}")) == (code, (rows, columns), bytes(range(size)))
        read = written.slice(f"x.{code}", 1, rows)
        assert bytes(read.contiguous().view(torch.uint8).flatten().tolist()) == bytes(range(size // rows, size))
    odd = header.replace(b"[2, 4]", b"[4, 2]")
    (folder / "more.safetensors").write_bytes(len(odd).to_bytes(8, "little") + odd + data)
    with pytest.raises(CheckpointError, match="rows do not fill whole bytes"):
        Checkpoint.open(folder).slice("x.F6_E3M2", 1, 2)
    header = header.replace(b"[3, 8]", b"[3, 7]").replace(b"[0, 12]", b"[0, 10]")
    (folder / "more.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    done = run("merge", recipe, tmp_path / "odd", expect=2)
    assert "F4 elements do not fill whole bytes" in done.err
