"""What recipes of mergekit have and ours need not: anchors, empty slices, text for numbers, values without an effect.

tests/parity compares the tensors with mergekit's own.
"""

from __future__ import annotations

import json

import pytest
import torch
from support import load, make_model, weights, write_recipe

from deus_merge import api
from deus_merge.recipe.mergekit import ignored
from deus_merge.recipe.reader import parse_recipe
from deus_merge.recipe.types import Recipe
from deus_merge.recipe.writer import dump_recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Four models: a, b and c with heads of their own, t with a tied one."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        make_model(root / name, seed=seed)
    make_model(root / "t", seed=9, tied=True)
    return root


@pytest.fixture
def merge(run, models, tmp_path, monkeypatch):
    """Merge a recipe whose models are named by letters; the tensors of the output, and the warnings."""
    monkeypatch.chdir(models)

    def call(text: str, out: str = "out"):
        done = run("merge", write_recipe(tmp_path / f"{out}.yml", text), tmp_path / out, "--quiet")
        return weights(tmp_path / out), done.err

    return call


def test_slices_without_layers_choose_embeddings_and_head(merge, models):
    text = "merge_method: passthrough\nslices:\n" + "".join(
        f"  - sources: [{{model: {model}, layer_range: [{start}, {end}]}}]\n"
        for model, start, end in [("b", 0, 0), ("a", 0, 2), ("b", 4, 4), ("a", 2, 4), ("c", 1, 1)]
    )
    out, told = merge(text)
    a, b, c = (weights(models / name) for name in "abc")
    expected = {**a, "model.embed_tokens.weight": b["model.embed_tokens.weight"]}
    expected |= {name: c[name] for name in ("model.norm.weight", "lm_head.weight")}
    assert out.keys() == expected.keys() and all(torch.equal(out[name], expected[name]) for name in out)
    assert told.count("adds no layers") == 3 and "slices[2] (line 5): the slice adds no layers" in told


@pytest.mark.parametrize(("layers", "edge"), [("a", "t"), ("t", "a")])
def test_an_empty_last_slice_may_have_a_tied_head_or_one_of_its_own(merge, models, tmp_path, layers, edge):
    out, _ = merge(
        f"merge_method: passthrough\nslices:\n  - sources: [{{model: {layers}, layer_range: [0, 4]}}]\n"
        f"  - sources: [{{model: {edge}, layer_range: [0, 0]}}]\n"
    )
    model = load(tmp_path / "out")
    heads = {"t": "model.embed_tokens.weight", "a": "lm_head.weight"}
    assert "lm_head.weight" in out
    assert torch.equal(model.lm_head.weight, weights(models / edge)[heads[edge]])
    assert torch.equal(model.model.embed_tokens.weight, weights(models / layers)["model.embed_tokens.weight"])
    assert torch.equal(out["model.norm.weight"], weights(models / edge)["model.norm.weight"])


def test_a_slice_of_slerp_with_one_source_is_a_copy(merge, models):
    text = """
merge_method: slerp
base_model: a
slices:
  - sources: [{model: c, layer_range: [0, 1]}]
  - sources: [{model: a, layer_range: [1, 4]}, {model: b, layer_range: [1, 4]}]
parameters: {t: 1}
"""
    out, told = merge(text)
    for name, tensor in out.items():
        if "layers.0." in name:
            assert torch.equal(tensor, weights(models / "c")[name]), name
        elif "layers." in name:
            assert torch.allclose(tensor, weights(models / "b")[name], atol=1e-6), name
    assert told.count("a slice of slerp has one source: it is copied, and t has no effect there") == 1
    alone, _ = merge("merge_method: slerp\nslices:\n  - sources: [{model: c, layer_range: [0, 2]}]\n", "alone")
    assert torch.equal(alone["lm_head.weight"], weights(models / "c")["lm_head.weight"])


def test_override_architecture_is_what_the_config_names(run, merge, models, tmp_path):
    reference = "{model: {path: a}, override_architecture: MistralForCausalLM}"
    merge(f"merge_method: passthrough\nslices:\n  - sources: [{{model: {reference}, layer_range: [0, 2]}}]\n")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["MistralForCausalLM"], "llama")
    again = run("plan", tmp_path / "out/deus_merge.yml", "--json").json()["plan_hash"]
    assert again == json.loads((tmp_path / "out/deus_merge.json").read_text())["plan_hash"]
    plain = (tmp_path / "out/deus_merge.yml").read_text().replace("override_architecture: MistralForCausalLM", "")
    plain = parse_recipe(plain.replace(", }", "}"), str(tmp_path / "out/deus_merge.yml"))
    assert "override" not in dump_recipe(plain) and api.plan(plain).hash != again


def test_override_architecture_of_another_model_is_ignored_with_a_warning():
    text = "merge_method: linear\nparameters: {weight: 1}\nbase_model: b\nmodels:\n  - model: b\n  - model: "
    recipe = parse_recipe(text + "{model: a, override_architecture: YiForCausalLM}\n")
    assert len(recipe.notes) == 1 and "models[1].model (line 6): override_architecture is ignored" in recipe.notes[0]
    assert "that of b" in recipe.notes[0]
    assert "override_architecture: YiForCausalLM" in dump_recipe(recipe)
    assert parse_recipe(text + "a\n").notes == ()


def test_parameters_of_the_whole_slice_at_a_source_change_nothing(merge):
    text = "merge_method: ties\nbase_model: a\nmodels:\n  - {model: b, parameters: {weight: 1, density: 0.5%s}}\n"
    with_lambda, told = merge(text % ", lambda: 0.1")
    without, silent = merge(text % "", "without")
    assert all(torch.equal(tensor, without[name]) for name, tensor in with_lambda.items())
    place = "models[0].parameters.lambda (line 4): ignored, since lambda is a parameter of the whole slice"
    assert place in told and "ignored" not in silent
    assert "lambda: 0.1" in dump_recipe(parse_recipe(text % ", lambda: 0.1"))  # as it was written


def test_text_for_numbers_means_the_numbers():
    def recipe(zero: str, three: str, t: str, every: str) -> Recipe:
        source = "{{model: {}, layer_range: [{}, {}]}}"
        sources = ", ".join(source.format(m, zero, three) for m in "ab")
        return parse_recipe(
            f"merge_method: slerp\nbase_model: a\nslices: [{{sources: [{sources}]}}]\nparameters: {{t: {t}}}\n"
            f"tokenizer: {{source: base, pad_to_multiple_of: {every}}}\n"
        )

    text, numbers = recipe("'0'", "'3'", "[0.5]", "'8'"), recipe("0", "3", "[0.5]", "8")
    assert text == numbers and recipe("0.0", "3.0", "['0.5']", "8.0") == numbers
    assert text.slices[0].sources[0].layer_range == (0, 3)


ANCHORS = "{name}: &c {{parameters: {{scale: 2}}}}\nmerge_method: passthrough\nmodels: [{{<<: *c, model: a}}]\n"


@pytest.mark.parametrize("name", ["x-common", ".common", "common", "_", "anchors"])
def test_keys_that_hold_anchors(name):
    recipe = parse_recipe(ANCHORS.format(name=name))
    assert recipe.slices[0].sources[0].parameters["scale"].value == 2
    assert "common" not in dump_recipe(recipe)


@pytest.mark.parametrize("text", ["chat_template: {}\n", "base_model: {}\ntokenizer: {}\nout_dtype: {}\nmodules: {}\n"])
def test_keys_without_a_value_are_as_good_as_missing(text):
    rest = "merge_method: passthrough\nmodels: [{model: a}]\n"
    for nothing in ("", "~", "null"):
        assert parse_recipe(text.format(*[nothing] * 4) + rest) == parse_recipe(rest)


def test_a_sound_recipe_has_no_notes():
    text = "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 2], parameters: {scale: 2}}]}]\n"
    assert list(ignored(parse_recipe(text))) == []
