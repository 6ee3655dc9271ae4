"""The manifest as a typed document: its formats, its schema, and the places that its error messages name."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_schema import fits
from support import load, make_model, write_recipe

from deus_merge import api
from deus_merge.core.errors import VerifyError
from deus_merge.core.tensors import Action
from deus_merge.core.typed_json import Misfit, parse
from deus_merge.recipe.presets import PRESETS
from deus_merge.report.manifest import Manifest, read_manifest, seal
from deus_merge.report.old_formats import upgraded
from deus_merge.report.shareable import shared_manifest

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs/manifest.schema.json").read_text(encoding="utf-8"))
FORMAT_2 = Path(__file__).with_name("format2.json")  # written by the version before format 3


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, tiny) -> dict[str, Path]:
    """An output of every preset on the tiny model, and one with modules' and documents' parts."""
    folder = tmp_path_factory.mktemp("manifest")
    for preset in PRESETS:
        api.merge(api.upscale_recipe(tiny, preset=preset), folder / preset)
    (folder / "two.yml").write_text(
        f"merge_method: linear\nname: mean\nmodels: [{{model: {tiny}, parameters: {{weight: 1}}}}]\n---\n"
        "base_model: mean\nupscale: {preset: opt_deus, insert: {after: [1]}}\n"
    )
    api.merge(folder / "two.yml", folder / "two documents")
    api.merge(api.upscale_recipe(folder / "opt_deus", preset="copy_next"), folder / "grown twice")
    return {path.name: path for path in folder.iterdir() if path.is_dir()}


def data_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "deus_merge.json").read_text(encoding="utf-8"))


def test_the_schema_is_up_to_date():
    script = runpy.run_path(str(ROOT / "docs/make_schema.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["render"](), "run: python docs/make_schema.py"


def test_every_preset_writes_what_the_schema_and_the_classes_describe(outputs):
    """And reading loses nothing: all keys are known, and what is written again is the same file."""
    for name, out in outputs.items():
        data = data_of(out)
        assert fits(data, SCHEMA), name
        manifest = read_manifest(out)
        assert shared_manifest(manifest.to_json(), out) == {
            key: value for key, value in data.items() if key != "sha256"
        }, name
        assert manifest.sealed(out) == (out / "deus_merge.json").read_bytes(), name
    assert read_manifest(outputs["two documents"]).documents[0]["name"] == "mean"
    first, second = read_manifest(outputs["grown twice"]).growths
    assert len(first.new_layers) == 3 and second == read_manifest(outputs["grown twice"]).growth


def paths(value: Any, at: tuple = ()) -> list[tuple]:
    """Where every value of JSON data is; of long lists and objects only the first and the last."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    inner = [
        path
        for key, item in (items if len(items) < 30 else items[:: len(items) - 1])
        for path in paths(item, (*at, key))
    ]
    return [at, *inner]


STRANGE = [None, True, -1, 0, 10**6, 1.5, "", "copy", [], ["copy"], {}, {"model": "x"}]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_schema_and_classes_agree_on_what_is_malformed(outputs, draw):
    """A part is replaced or left out: the published schema accepts the rest exactly where the classes do, and the
    message names the place."""
    data = copy.deepcopy(data_of(outputs[draw.draw(st.sampled_from(["opt_deus", "two documents", "grown twice"]))]))
    *inside, key = draw.draw(
        st.sampled_from([path for path in paths(data) if path and path[0] not in ("sha256", "format")])
    )
    holder = data
    for step in inside:
        holder = holder[step]
    if draw.draw(st.booleans()):
        del holder[key]
    else:
        holder[key] = draw.draw(st.sampled_from(STRANGE))
    try:
        parse(Manifest, data)
    except Misfit as misfit:
        assert not fits(data, SCHEMA)
        top, *_ = [*inside, key]
        assert misfit.place.startswith(top), misfit.place
    else:
        assert fits(data, SCHEMA)


def test_a_manifest_of_format_2_in_the_words_of_format_3():
    manifest = read_manifest(FORMAT_2)
    assert [layer.how for layer in manifest.layers] == ["cast", "copy + zeros", "copy", "compute", "copy", "compute"]
    assert Counter(t.action for t in manifest.tensors.values()) == {
        Action.COPY: 19, Action.CAST: 9, Action.ZEROS: 11, Action.COMPUTE: 18,
    }  # fmt: skip
    assert manifest.format == 2 and "README.md" not in manifest.files and "config.json" in manifest.files
    assert manifest.layers[3].diagnostics and manifest.weights and manifest.growth.new_layers == (2, 3)
    again = manifest.sealed()
    assert json.loads(again)["format"] == 3 and fits(json.loads(again), SCHEMA)


@pytest.mark.parametrize(
    ("kind", "actions"),
    [
        ("copy", ["copy"]), ("copy, zeroed", ["copy", "zeros"]), ("derived", ["derive"]), ("cast", ["cast"]),
        ("merged", ["compute"]), ("fused", ["compute"]),
    ],
)  # fmt: skip
def test_the_words_of_old_formats(kind, actions):
    layer = {"layer": 0, "kind": kind, "diagnostics": [{"role": "q", "tensor": "t"}]}
    data = {
        "format": 1,
        "layers": [layer],
        "modules": {"vision": {"num_layers": 1, "layers": [layer]}},
        "documents": [{"name": "first", "layers": [layer]}],
        "tensors": {"a": {"action": "merge"}, "b": {"action": "cast"}},
        "files": {"README.md": "0", "config.json": "1"},
    }
    before = copy.deepcopy(data)
    found = upgraded(data)
    new = {"layer": 0, "actions": actions, "diagnostics": layer["diagnostics"]}
    assert found["layers"] == found["modules"]["vision"]["layers"] == found["documents"][0]["layers"] == [new]
    assert found["tensors"] == {"a": {"action": "compute"}, "b": {"action": "cast"}}
    assert found["files"] == {"config.json": "1"} and (found["weights"], found["layer_lists"]) == ({}, [])
    assert data == before
    assert upgraded(data | {"format": 3}) == data | {"format": 3}


@pytest.mark.parametrize("part", ["layers", "modules", "documents", "tensors", "files", "sources", "weights"])
@pytest.mark.parametrize(
    "value", [None, 3, "x", [3], {"x": 3}, [{"layers": 3}], {"x": {"layers": [7]}}, [{"kind": []}]]
)
def test_hostile_parts_of_old_formats_are_refused(tmp_path, part, value):
    data = json.loads(FORMAT_2.read_text()) | {part: value}
    path = tmp_path / "deus_merge.json"
    path.write_bytes(seal(data))
    try:
        read_manifest(path)
    except VerifyError as error:
        assert f"the manifest is malformed: {part}" in str(error) and "expected:" in str(error)
    else:
        assert part == "modules" and value is None


@pytest.mark.parametrize("found", [0, 4, "3", None, True, 3.0, [3]])
def test_other_formats_are_refused(tmp_path, found):
    path = tmp_path / "deus_merge.json"
    path.write_bytes(seal(json.loads(FORMAT_2.read_text()) | {"format": found}))
    with pytest.raises(VerifyError, match="not a manifest this version reads"):
        read_manifest(path)


@pytest.mark.parametrize("version", [2, 3])
def test_an_edited_manifest_is_refused(tmp_path, version):
    path = tmp_path / "deus_merge.json"
    content = FORMAT_2.read_bytes() if version == 2 else read_manifest(FORMAT_2).sealed()
    path.write_bytes(content.replace(b'"donor": 0', b'"donor": 1'))
    with pytest.raises(VerifyError, match="not as it was written"):
        read_manifest(path)


def test_a_copy_needs_a_source_with_a_folder():
    data = json.loads(FORMAT_2.read_text())
    del data["sources"][0]["folder"]
    with pytest.raises(Misfit) as caught:
        Manifest.from_json(data)
    assert caught.value.place.startswith("tensors[") and "that has a folder" in caught.value.expected


def test_messages_name_place_and_both_sides(tmp_path):
    data = json.loads(FORMAT_2.read_text())
    data["layers"][3]["sources"][0]["layer"] = "1"
    path = tmp_path / "deus_merge.json"
    path.write_bytes(seal(data))
    with pytest.raises(VerifyError) as caught:
        read_manifest(path)
    assert caught.value.message == "the manifest is malformed: layers[3].sources[0].layer"
    assert (caught.value.expected, caught.value.got) == ("a whole number from 0 to 99999", "'1'")


def test_a_layer_must_be_one_of_its_source(tmp_path):
    data = json.loads(FORMAT_2.read_text())
    data["layers"][1]["sources"][0]["layer"] = 2  # the source has 0 and 1
    with pytest.raises(Misfit) as caught:
        Manifest.from_json(data)
    assert (caught.value.place, caught.value.got) == ("layers[1].sources[0].layer", "2")


def test_sources_of_copied_and_derived_tensors(run, tmp_path):
    """Copies name the checkpoint that they are stored in; derived tensors the source that was changed."""
    peft = pytest.importorskip("peft")
    base = make_model(tmp_path / "base", vocab_size=16, layers=2)
    make_model(tmp_path / "other", vocab_size=16, layers=2, seed=1)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(load(base), config).save_pretrained(tmp_path / "adapter")
    adapted = f"{base}+{tmp_path / 'adapter'}"
    for weight in (0, 1):
        models = f"[{{model: {tmp_path / 'other'}, parameters: {{weight: {weight}}}}}, {{model: {adapted}}}]"
        text = f"merge_method: linear\nmodels: {models}\nparameters: {{weight: 1}}\n"
        run("merge", write_recipe(tmp_path / "r.yml", text), tmp_path / str(weight))
    manifest = read_manifest(tmp_path / "0")
    assert [s.folder for s in manifest.sources] == [str(tmp_path / "other"), None, str(base)]
    q, up = (manifest.tensors[f"model.layers.0.{name}_proj.weight"] for name in ("self_attn.q", "mlp.up"))
    assert (q.action, q.derived, q.model) == (Action.DERIVE, (1,), None)
    assert (up.action, up.derived, up.model, up.tensor) == (Action.COPY, (), 2, "model.layers.0.mlp.up_proj.weight")
    q, up = (
        read_manifest(tmp_path / "1").tensors[f"model.layers.0.{n}_proj.weight"] for n in ("self_attn.q", "mlp.up")
    )
    assert (q.action, q.derived) == (Action.COMPUTE, (1,)) and (up.action, up.derived) == (Action.COMPUTE, ())


def test_diagnostics_are_those_of_the_layer(run, tmp_path):
    """Learned layers are computed together, role by role, with others between them: each layer has the diagnostics of
    all its blocks, and copied ones have none."""
    base = make_model(tmp_path / "base", layers=5)
    run("upscale", base, tmp_path / "out", "--preset", "lesa", "--insert", "{after: [0, 2]}")
    manifest = read_manifest(tmp_path / "out")
    assert [layer.layer for layer in manifest.layers if layer.diagnostics] == list(manifest.new_layers) == [1, 4]
    roles = ["q", "k", "v", "o", "gate", "up", "down"]
    assert all([line["role"] for line in manifest.layers[i].diagnostics] == roles for i in manifest.new_layers)


def test_the_model_card_is_the_users(run, tiny, tmp_path):
    """Edited or removed, also where an old manifest has its checksum; all other files are still checked."""
    out = tmp_path / "out"
    run("upscale", tiny, out)
    assert "README.md" not in read_manifest(out).files
    card = out / "README.md"
    card.write_text(card.read_text().replace("library_name:", "license: mit\nlibrary_name:"))
    assert run("verify", out, "--strict", "--json").json()["passed"]
    run("report", out)
    data = data_of(out)
    data["files"]["README.md"] = "0" * 64
    (out / "deus_merge.json").write_bytes(seal(data))
    assert run("verify", out, "--quick", "--strict", "--json").json()["passed"]
    card.unlink()
    assert run("verify", out, "--quick", "--strict", "--json").json()["passed"]
    (out / "generation_config.json").write_text("{}")
    assert "generation_config.json is not as it was written" in run("verify", out, "--quick", expect=3).out


def test_outputs_of_old_formats_are_verified_stripped_and_reported(run, tiny, tmp_path):
    """As the version before wrote them, model card and all."""
    run("upscale", tiny, tmp_path / "new", "--insert", "top_half")
    for version in (1, 2):
        out = Path(shutil.copytree(tmp_path / "new", tmp_path / f"format{version}"))
        data = data_of(out) | {"format": version}
        for layer in data["layers"]:
            layer["kind"] = "fused" if "compute" in layer.pop("actions") else "copy"
        for tensor in data["tensors"].values():
            tensor["action"] = "merge" if tensor["action"] == "compute" else tensor["action"]
        data["files"]["README.md"] = "0" * 64
        if version == 1:
            del data["weights"], data["layer_lists"]
            for tensor in data["tensors"].values():
                del tensor["dtype"], tensor["shape"], tensor["xxh3_128"]
            (out / "deus_merge.json").write_text(json.dumps(data))
        else:
            (out / "deus_merge.json").write_bytes(seal(data))
        checks = {c["name"]: c["passed"] for c in run("verify", out, "--quick", "--json").json()["checks"]}
        assert [name for name, passed in checks.items() if not passed] == (["checksums"] if version == 1 else [])
        run("report", out)
        assert "layer 3: compute of tiny 2 + tiny 3" in (out / "report.html").read_text()
        reported = run("strip", out, tmp_path / f"base{version}", "--json").json()
        assert reported["same_files"] and reported["different"] == []
