"""Hostile input by name, found by fuzzing or thinking: refused at once with a message. The files are small ones of
`fuzz.workshop`, changed in one place."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from fuzz.workshop import ADAPTER_CONFIG, CONFIG, TOKENIZER_CONFIG, Special, header_of, shapes, values, weights_file
from safetensors.torch import load_file, save_file
from support import make_model, weights

from deus_merge.report.manifest import seal

GIGABYTES = 100_000_000_000
SECONDS = 10  # each takes far less than one


def config(**changes) -> dict:
    return {"base/config.json": json.dumps(CONFIG | changes).encode()}


def raw_config(text: str) -> dict:
    """config.json with one more key, whose value is any text."""
    return {"base/config.json": (json.dumps(CONFIG)[:-1] + f', "x": {text}}}').encode()}


def recipe(text: str) -> dict:
    return {"recipe.yml": text.encode()}


def tensors(changes: dict[str, str], **extra: list[int]) -> dict:
    """The model's weights with tensors of other names, and more tensors."""
    sizes = {changes.get(n, n): s for n, s in shapes().items()} | extra
    count = sum(len(values(1, 0)) // 4 * _numel(s) for s in sizes.values())
    return {"base/model.safetensors": weights_file(header_of(sizes), values(count, 0))}


def _numel(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())


def adapter(**changes) -> dict:
    return {
        "adapter/adapter_config.json": json.dumps(ADAPTER_CONFIG | changes).encode(),
        **recipe("{merge_method: passthrough, models: [{model: base+adapter}]}"),
    }


def stack(insert: str) -> dict:
    return recipe(f"base_model: base\nupscale: {{preset: stack, insert: {insert}}}\n")


_LAYER = "model.layers.0.input_layernorm.weight"
_MANY = "slices:\n  - &a {sources: [{model: base}]}\n" + "  - *a\n" * 9_000 + "merge_method: passthrough\n"
_LENGTH = (50_000_000_000).to_bytes(8, "little")

# Files, and fragments of the message of `deus-merge plan recipe.yml`.
REFUSED = {
    # numbers
    "a layer's index of 5000 digits": (tensors({_LAYER: f"model.layers.{'9' * 5000}.x"}), "layer 0 lacks its 'n1'"),
    "a number of 5001 digits": (raw_config("1" + "0" * 5000), "the config is not strict JSON", "5001 digits"),
    "heads of 4000 digits": (raw_config("9" * 4000), "a number of 4000 digits"),
    "NaN": (raw_config("NaN"), "NaN is not a JSON number"),
    "infinity": (raw_config("[-Infinity]"), "-Infinity is not a JSON number"),
    "1e400": (raw_config("1e400"), "1e400 is not a JSON number"),
    "a number to the base 60": (recipe("upscale: " + "1:" * 100_000 + "1"), "not a plain value", "!!int"),
    "a hexadecimal number": (recipe(f"base_model: 0x{'f' * 100_000}\nupscale: {{}}\n"), "not a plain value", "!!int"),
    "a billion layers": (stack("{count: 1000000000}"), "insert.count (line 2): the output has too many layers", "5000"),
    "27 000 layers": (recipe(_MANY), "the output has too many layers", "expected: at most 5000"),
    # depth and size
    "lists 20 000 deep": (raw_config("[" * 20_000 + "]" * 20_000), "config.json: the config is nested too deeply"),
    "lists 100 deep": (raw_config("[" * 100 + "]" * 100), "the config is nested too deeply", "at most 64 levels"),
    "open lists": (recipe("a: " + "[" * 900 + "b, " * 20_000), "the recipe is nested too deeply", "at most 32 levels"),
    "100 000 values": (recipe("slices: [" + "b," * 100_000 + "]"), "the recipe is too large", "at most 20000 values"),
    "101 documents": (recipe("---\n".join(f"{{name: m{i}, base_model: b, upscale: {{}}}}\n" for i in range(101))),
                      "the recipe has too many documents", "at most 100", "got:      101"),
    "2 MB of comments": (recipe("# x\n" * 500_000), "the recipe is too large", "at most 1000000 bytes"),
    "a header of 50 GB": ({"base/model.safetensors": Special("sparse", size=GIGABYTES, begin=_LENGTH + b"{")},
                          "the header is too long", "at most 100000000 bytes", "got:      50000000000 bytes"),
    "a config of 100 GB": ({"base/config.json": Special("sparse", size=GIGABYTES)}, "config.json: the file is"),
    "an index of 100 GB": ({"base/model.safetensors.index.json": Special("sparse", size=GIGABYTES)}, "is too large"),
    "a tokenizer of 100 GB": ({"base/tokenizer.json": Special("sparse", size=GIGABYTES)}, "the file is too large"),
    "a licence of 100 GB": ({"base/LICENSE": Special("sparse", size=GIGABYTES)}, "LICENSE: the file is too large"),
    # names
    "half a character in a template": (recipe(r'{base_model: base, upscale: {}, chat_template: "{{ \ud800 }}"}'),
                                       "chat_template (line 1): the text has a lone surrogate"),
    "a tensor named like a role": (tensors({}, **{"model.layers.0.q": [8, 8]}), "has the name of the role 'q'"),
    "escapes in a tensor's name": (tensors({_LAYER: "\x1b]0;x\x07"}), "has control characters", r"\x1b]0;x"),
    "a tensor's name of 50 000": (tensors({_LAYER: "\u202e" * 50_000}), "lacks its 'n1'"),
    "a file's name of 50 000": ({"base/model.safetensors.index.json":
                                 json.dumps({"weight_map": {"a": "\x1b" * 50_000}}).encode()}, "outside of the folder"),
    # files that are none
    "a tokenizer from a FIFO": ({"base/tokenizer.json": Special("fifo")}, "tokenizer.json: not a regular file"),
    "weights from a FIFO": ({"base/model.safetensors": Special("fifo")}, "model.safetensors: not a regular file"),
    "weights from a device": ({"base/model.safetensors": Special("link", "/dev/zero")}, "not a regular file"),
    "a licence from a device": ({"base/LICENSE": Special("link", "/dev/zero")}, "a link leads out of", "/dev/zero"),
    "a licence from elsewhere": ({"base/LICENSE": Special("link", "/etc/passwd")}, "base/LICENSE: a link leads out"
                                 " of the model's folder", "got:      a link to /etc/passwd", "cp -L"),
    "a licence through the folder": ({"base/LICENSE": Special("link", "../base/../recipe.yml")}, "a link leads out of"),
    "another model's code": ({**config(auto_map={}), "base/me.py": Special("link", "../other/me.py"),
                                 "other/me.py": b"SECRET = 1\n"}, "base/me.py: a link leads out of the model's folder"),
    "a tokenizer that is gone": ({"base/tokenizer.json": Special("link", "../base/gone")}, "to a missing file"),
    "a loop of links": ({"base/config.json": Special("link", "config.json")}, "config.json: the file cannot be opened"),
    # values of another kind
    "an adapter's alpha as text": (adapter(lora_alpha="4"), "lora_alpha has a wrong type", "got:      '4'"),
    "an adapter's endless pattern": (adapter(alpha_pattern={"(.*)*(.*)*x": 4}), "alpha_pattern is malformed", "(.*)*"),
    "max_window_layers is text": (config(use_sliding_window=True, max_window_layers="2", layer_types=None),
                                  "config.json's max_window_layers is ['2'], not integers"),
    "a template's config a list": ({**recipe('{base_model: base, upscale: {}, chat_template: "{{ x }}"}'),
                                    "base/tokenizer_config.json": b"[1]"}, "tokenizer_config.json is not a JSON o"),
}  # fmt: skip

# Files with which it goes on.
TAKEN = {
    "braces in the names": tensors({n: n.replace("model.layers", "{x}.layers") for n in shapes()})
    | config(model_type="mystery"),
    "the braces of our own": tensors({n: n.replace("model.layers", "{layer}.h") for n in shapes()})
    | config(model_type="mystery"),
    "a tokenizer by its own name": {"base/tokenizer.json": Special("link", "../other/tokenizer.json")},
    "a licence inside the folder": {"base/LICENSE": Special("link", "config.json")},
    "weights from elsewhere": {"blob": tensors({})["base/model.safetensors"],
                               "base/model.safetensors": Special("link", "../blob")},
    "half a character in the config": raw_config('"\\ud800"'),
    "half a character in another key": {"base/tokenizer_config.json": b'{"x": "\\ud800", "chat_template": ""}'},
    "a number of 31 digits": {"base/tokenizer_config.json": json.dumps(TOKENIZER_CONFIG).encode()},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(fit, workshop, monkeypatch, name):
    files, *fragments = REFUSED[name]
    monkeypatch.chdir(workshop.root)
    began = time.process_time()
    with workshop.changed(recipe("{base_model: base, upscale: {preset: copy_next}}") | files):
        done = fit("plan", "recipe.yml", expect=2)
    assert time.process_time() - began < SECONDS
    for fragment in fragments:
        assert fragment in done.err, done.err


@pytest.mark.parametrize("name", TAKEN)
def test_taken(fit, workshop, monkeypatch, name):
    monkeypatch.chdir(workshop.root)
    plain = recipe("{merge_method: passthrough, slices: [{sources: [{model: base, layer_range: [1, 3]}]}]}")
    with workshop.changed(plain | TAKEN[name]):
        fit("merge", "recipe.yml", "out")
        assert not any(path.is_symlink() for path in Path("out").iterdir())
        written = weights(Path("out"))
    assert len(written) == 21  # two layers of nine, and three outside


def test_a_layer_with_a_zero_before_its_index_is_not_lost(fit, workshop, monkeypatch):
    """Two names must not stand for one layer: one of the two tensors would be gone."""
    monkeypatch.chdir(workshop.root)
    odd = _LAYER.replace(".0.", ".00.")
    with workshop.changed(tensors({}, **{odd: [8]}) | recipe("{base_model: base, upscale: {preset: copy_next}}")):
        fit("merge", "recipe.yml", "out")
        written, source = weights(Path("out")), weights(Path("base"))
    assert torch.equal(written[odd], source[odd]) and torch.equal(written[_LAYER], source[_LAYER])


def test_models_whose_configs_name_the_depth_differently(fit, workshop, monkeypatch):
    """Per-layer lists come from the config of the model that the layer is from, by that config's own key."""
    monkeypatch.chdir(workshop.root)
    other = {k: v for k, v in CONFIG.items() if k != "num_hidden_layers"}
    text = "{merge_method: passthrough, slices: [{sources: [{model: base}]}, {sources: [{model: other}]}]}"
    files = config(model_type="mystery") | {
        "other/config.json": json.dumps(other | {"model_type": "mystery", "n_layer": 3}).encode()
    }
    with workshop.changed(recipe(text) | files):
        fit("merge", "recipe.yml", "out")
        written = json.loads(Path("out/config.json").read_text())
    assert written["num_hidden_layers"] == 6 and written["layer_types"] == ["full_attention"] * 6


def test_heads_beyond_float32(fit, tmp_path):
    base = make_model(tmp_path / "base", layers=2)
    tensors = load_file(base / "model.safetensors")
    for role in ("q", "k"):  # what they compute together is infinite
        tensors[f"model.layers.1.self_attn.{role}_proj.weight"] *= 1e30
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    done = fit("upscale", base, tmp_path / "out", "--insert", "all", expect=2)
    assert "layer 1: the attention heads cannot be compared" in done.err


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda m: m.update(files={"../../etc/passwd": "0"}), "malformed: files['../../etc/passwd']"),
        (lambda m: m.update(files={"/etc/passwd": "0"}), "malformed: files['/etc/passwd']"),
        (lambda m: m["sources"].clear(), "malformed: donor"),
        (lambda m: m["sources"][0].pop("fingerprint"), "malformed: sources[0].fingerprint"),
        (lambda m: m.update(donor=7), "malformed: donor"),
        (lambda m: m.update(donor="0"), "malformed: donor"),
        (lambda m: m.update(layer_prefix=3), "malformed: layer_prefix"),
        (lambda m: m.update(num_layers="3"), "malformed: num_layers"),
        (lambda m: m.update(new_layers=["0"]), "malformed: new_layers[0]"),
        (lambda m: m["tensors"].update(x=[]), "malformed: tensors.x"),
        (lambda m: m["sources"][0].update(layers=10**9), "malformed: sources[0].layers"),
        (lambda m: m["layers"][1]["sources"].clear(), "malformed: layers[1].sources"),
        (lambda m: m["layers"][0]["sources"][0].update(layer=99), "malformed: layers[0].sources[0].layer"),
        (lambda m: m.pop("versions"), "malformed: versions"),
        (lambda m: m["tensors"].update(x={"action": "copy", "model": 3, "tensor": "x"}), "malformed: tensors.x"),
        (lambda m: m["tensors"].update(x={"action": "merge"}), "malformed: tensors.x.action"),
        (lambda m: m["tensors"].update({"a.b": {"action": "zeros", "shape": [-1]}}), "tensors['a.b'].shape[0]"),
        (lambda m: m["layers"][0]["sources"][0].update(model="other"), "malformed: layers[0].sources[0].model"),
        (lambda m: m["layers"][0].update(actions="copy"), "malformed: layers[0].actions"),
        (lambda m: m["layers"][0].update(actions=["copy", "merge"]), "malformed: layers[0].actions[1]"),
        (lambda m: m["layers"][0].update(diagnostics=[{"role": "q"}]), "malformed: layers[0].diagnostics[0].tensor"),
        (lambda m: m.update(lineage=[[], []]), "malformed: lineage[0]"),
        (lambda m: m.update(modules={"vision": {"num_layers": 10**9, "layers": []}}), "modules.vision.num_layers"),
        (lambda m: m.update(num_layers=True), "malformed: num_layers"),
        (lambda m: m.update(vocabulary={"tokens": 3}), "malformed: vocabulary.digest"),
    ],
)
def test_a_manifest_that_lies_is_refused(fit, workshop, monkeypatch, change, fragment):
    monkeypatch.chdir(workshop.root)
    record = json.loads(workshop.finished["done/deus_merge.json"])
    change(record)
    with workshop.changed({"done/deus_merge.json": seal(record)}):
        assert fragment in fit("verify", "done", expect=3).out
        assert fragment in fit("report", "done", expect=3).err


@pytest.mark.parametrize("special", [Special("fifo"), Special("sparse", size=GIGABYTES), Special("link", "/dev/zero")])
def test_a_manifest_that_is_no_file_is_refused(fit, workshop, monkeypatch, special):
    monkeypatch.chdir(workshop.root)
    assert workshop.finished
    with workshop.changed({"done/deus_merge.json": special}):
        fit("verify", "done", expect=3)


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(fit, workshop, tmp_path):
    """The cache's own links are followed; from another model's folder they would not be."""
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted((workshop.root / "base").iterdir())):
        (blobs / f"{i:040x}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{i:040x}")
    fit("upscale", snapshot, tmp_path / "out", "--preset", "copy_next")
    assert not (tmp_path / "out/tokenizer.json").is_symlink()
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == TOKENIZER_CONFIG
    snapshot.rename(tmp_path / "loose")
    (tmp_path / "blobs").mkdir()
    done = fit("upscale", tmp_path / "loose", tmp_path / "out2", "--preset", "copy_next", expect=2)
    assert "a link to a missing file" in done.err
