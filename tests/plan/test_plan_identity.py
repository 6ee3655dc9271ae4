"""The plan's hash: what decides the output's bytes changes it, and nothing else does. No tensor is read here."""

from __future__ import annotations

import json
import shutil

import pytest
from support import make_model, write_recipe

from deus_merge import api

LINEAR = (
    "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 0.4}}\n- {model: b, parameters: {weight: 0.6}}\n"
)
SLERP = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.3}\n"
GROWN = "base_model: a\nupscale: {insert: {after: [1]}}\n"
ALIGNED = LINEAR + "align: {alignment: symmetry, solver: assignment}\n"
REGULARISED = LINEAR + "align: {alignment: symmetry, solver: sinkhorn, reg: 0.1}\n"
MIXED = "merge_method: passthrough\nbase_model: c\nslices:\n" + "".join(
    f"- sources: [{{model: {model}, layer_range: [{start}, {start + 1}]}}]\n" for start, model in enumerate("aba")
)
SLICE = (
    "merge_method: slerp\nbase_model: a\nparameters: {t: 0.3}\nslices:\n- base_model: a\n"
    "  sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]\n"
)
STACKED = "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 3]}]\n"
LEARNED = "base_model: a\nupscale: {preset: lesa, insert: {after: [1]}, parameters: {width: 8}}\n"
UNLIKE = {
    "the weight of a source": (LINEAR, LINEAR.replace("0.4", "0.5")),
    "a parameter of the tensor": (SLERP, SLERP.replace("0.3", "0.4")),
    "the method": (LINEAR, LINEAR.replace("linear", "karcher").replace(", parameters: {weight: 0.4}", "").replace(
        ", parameters: {weight: 0.6}", "")),
    "the order of sources": (SLERP, SLERP.replace("{model: a}, {model: b}", "{model: b}, {model: a}")),
    "which source is the base": (SLERP, SLERP.replace("base_model: a", "base_model: b")),
    "which model a layer is of": (MIXED, MIXED.replace("a, layer_range: [2", "b, layer_range: [2")),
    "which source a slice starts from": (SLICE, SLICE.replace("- base_model: a", "- base_model: b")),
    "the dtype": (LINEAR, "dtype: bfloat16\n" + LINEAR),
    "the written dtype": ("dtype: float32\n" + LINEAR, "dtype: float32\nout_dtype: float16\n" + LINEAR),
    "aligned or not": (LINEAR, ALIGNED),
    "how it is aligned": (ALIGNED, ALIGNED.replace("symmetry", "transport_flow")),
    "a parameter of the alignment": (REGULARISED, REGULARISED.replace("0.1", "0.2")),
    "layers of a slice": (STACKED, STACKED.replace("[0, 3]", "[1, 4]")),
    "the number of layers": (STACKED, STACKED.replace("[0, 3]", "[0, 4]")),
    "the place of a new layer": (GROWN, GROWN.replace("[1]", "[2]")),
    "the place of a learned layer": (LEARNED, LEARNED.replace("[1]", "[2]")),
    "the preset": (GROWN, GROWN.replace("insert", "preset: average_zero, insert")),
    "a scale": (STACKED, STACKED + "parameters: {scale: 0.5}\n"),
    "a chat template": (STACKED, STACKED + "chat_template: '{{ messages }}'\n"),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        make_model(folder / name, layers=4, seed=seed)
    return folder


@pytest.fixture
def hash_of(models, monkeypatch, tmp_path):
    monkeypatch.chdir(models)

    def call(text: str, **options) -> str:
        return api.plan(write_recipe(tmp_path / "recipe.yml", text), **options).hash

    return call


@pytest.mark.parametrize("what", UNLIKE)
def test_what_decides_the_bytes_is_in_the_hash(hash_of, what):
    one, other = UNLIKE[what]
    assert hash_of(one) == hash_of(one) != hash_of(other)


def test_files_are_in_the_hash(hash_of, models, tmp_path):
    """How many there are, and what is written beside the weights."""
    assert hash_of(GROWN) != hash_of(GROWN, max_shard_size=20_000) != hash_of(GROWN, max_shard_size=40_000)
    before = hash_of(STACKED)
    shutil.copytree(models / "a", tmp_path / "edited")
    edited = STACKED.replace("model: a", f"model: {tmp_path / 'edited'}")
    assert hash_of(edited) == before  # where a model is does not matter
    for file, content in (("LICENSE", "mine"), ("generation_config.json", '{"top_k": 3}')):
        (tmp_path / "edited" / file).write_text(content)
        after = hash_of(edited)
        assert after != before, file
        before = after
    config = json.loads((tmp_path / "edited/config.json").read_text())
    (tmp_path / "edited/config.json").write_text(json.dumps(config | {"rope_theta": 3.0}))
    assert hash_of(edited) != before


def test_what_does_not_decide_the_bytes_is_not_in_the_hash(hash_of, models):
    """Names of models, spelled-out defaults, comments, and upscale: beside its slices."""
    plain = hash_of(LINEAR)
    assert hash_of("# a comment\n" + LINEAR.replace("model: a", f"model: {models / 'a'}")) == plain
    assert hash_of(LINEAR + "parameters: {normalize: true}\n") == plain
    slices = (
        "base_model: a\nslices:\n"
        "- {merge_method: passthrough, sources: [{model: a, layer_range: [0, 1]}]}\n"
        "- {merge_method: ot_fuse, sources: [{model: a, layer_range: [1, 3]}]}\n"
        "- {merge_method: passthrough, sources: [{model: a, layer_range: [3, 4]}]}\n"
    )
    assert hash_of(slices) == hash_of(GROWN)
