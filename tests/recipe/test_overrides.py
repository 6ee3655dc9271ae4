"""``--set`` and ``--model``: the place that they change, and nothing else."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deus_merge.core.errors import RecipeError
from deus_merge.core.yaml_text import parse_documents
from deus_merge.recipe.overrides import with_models, with_values

ONE = """
base_model: org/a
upscale: {insert: top_half, parameters: {reg: 0.1}}
"""
SLICES = """
x-source: &source {model: org/a, layer_range: [0, 2], parameters: {scale: [{filter: mlp, value: 2}, {value: 1}]}}
merge_method: passthrough
tokenizer: {source: base, tokens: {<s>: {source: org/b}, </s>: {source: {kind: model_token, model: org/b, token: x}}}}
slices:
  - sources: [*source]
  - sources: [*source]
    parameters:
  - sources: [{model: {model: {path: org/b, revision: main}, lora: org/l}}, {model: org/a+org/l}]
"""
TWO = "name: first\nmerge_method: linear\nmodels: [{model: org/a}]\n---\nbase_model: first\nupscale: {}\n"


def changed(text: str, *settings: str) -> list:
    return [document.plain() for document in with_values(parse_documents(text), settings)]


def models(text: str, *changes: str) -> list:
    return [document.plain() for document in with_models(parse_documents(text), changes)]


def without_anchors(text: str) -> list:
    return list(yaml.safe_load_all(yaml.safe_dump_all(yaml.safe_load_all(text))))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("abc:#-", max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("xy", min_size=1), inner),
    max_leaves=10,
)
SETTINGS = {
    "upscale.insert=all": lambda d: d["upscale"].update(insert="all"),
    "upscale.insert={count: 3, where: even}": lambda d: d["upscale"].update(insert={"count": 3, "where": "even"}),
    "upscale.parameters.reg=1e-1": lambda d: d["upscale"]["parameters"].update(reg="1e-1"),
    "upscale.parameters.zero_init=[o, down]": lambda d: d["upscale"]["parameters"].update(zero_init=["o", "down"]),
    "dtype=float32": lambda d: d.update(dtype="float32"),
    "tokenizer.tokens.<s>.source=org/z": lambda d: d.update(tokenizer={"tokens": {"<s>": {"source": "org/z"}}}),
    "dtype= float32": lambda d: d.update(dtype="float32"),
    "upscale.parameters.x=a=b": lambda d: d["upscale"]["parameters"].update(x="a=b"),
    "base_model=~": lambda d: d.update(base_model=None),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_value_is_set(setting):
    expected = yaml.safe_load(ONE)
    SETTINGS[setting](expected)
    assert changed(ONE, setting) == [expected]


@pytest.mark.parametrize("form", [".{}", "[{}]"])
def test_entries_of_lists_and_what_shares_their_anchor_stays(form):
    path = f"slices{form}.sources{form}.parameters.scale{form}.value".format(0, 0, 1)
    data = yaml.safe_load(SLICES)
    (found,) = changed(SLICES, f"{path}=7", "slices.1.parameters.scale=0")
    assert found["slices"][0]["sources"][0]["parameters"]["scale"] == [{"filter": "mlp", "value": 2}, {"value": 7}]
    assert found["slices"][1] == {"sources": data["slices"][1]["sources"], "parameters": {"scale": 0}}
    assert found["slices"][2] == data["slices"][2] and found["x-source"] == data["x-source"]


def test_documents_are_named_before_a_colon():
    first, last = changed(
        TWO, "dtype=float32", "first:dtype=float16", "first:models.0.model=org/b", "upscale.insert=a:b"
    )
    assert (first["dtype"], last["dtype"], last["upscale"]) == ("float16", "float32", {"insert": "a:b"})
    assert first["models"] == [{"model": "org/b"}]


@given(VALUES)
def test_any_yaml_value_is_set_as_it_is(value):
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n")
    assert changed(ONE, f"upscale.parameters={text}")[0]["upscale"]["parameters"] == value


WRONG_SETTINGS = {
    "no value": (["dtype="], "not a setting", "PATH=VALUE"),
    "no equals sign": (["dtype"], "not a setting", "got:      dtype"),
    "no path": (["=3"], "not a setting", "PATH=VALUE"),
    "an empty key": (["upscale..insert=3"], "--set: not a path", "upscale..insert"),
    "twice": (["dtype=float32", "dtype=float16"], "--set dtype: the value is set twice"),
    "not YAML": (["dtype=[a"], "--set dtype (line 1): not valid YAML", "the end of the text"),
    "in a value": (["upscale.insert.count=4"], "upscale.insert has no keys", "got:      'top_half'",
                   "--set 'upscale.insert={count: 4}'"),
    "deep in a value": (["base_model.a.b=[1, x]"], "--set 'base_model={a: {b: [1, 'x']}}'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_wrong_settings(name):
    settings, *fragments = WRONG_SETTINGS[name]
    with pytest.raises(RecipeError) as caught:
        changed(ONE, *settings)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


@pytest.mark.parametrize("path", ["slices.9.x", "slices.first", "slices.-1"])
def test_lists_have_numbers(path):
    with pytest.raises(RecipeError) as caught:
        changed(SLICES, f"{path}=3")
    assert caught.value.where == f"--set {path}" and "slices is a list" in str(caught.value)
    assert caught.value.expected == "a number from 0 to 2"


def test_the_only_model_is_replaced():
    (found,) = models(ONE, "./mine")
    assert found == {**yaml.safe_load(ONE), "base_model": "./mine"}
    first, last = models(TWO, "./mine")
    assert (first["models"], last["base_model"]) == ([{"model": "./mine"}], "first")


def test_one_of_several_models_is_replaced_everywhere():
    data = without_anchors(SLICES)[0]
    (found,) = models(SLICES, "org/a=./new", "org/b=org/c@v1")
    for source in (found["x-source"], found["slices"][0]["sources"][0], found["slices"][1]["sources"][0]):
        assert source == {**data["x-source"], "model": "./new"}
    assert found["slices"][2]["sources"][1]["model"] == "./new+org/l"  # the adapter stays
    assert found["slices"][2]["sources"][0] == data["slices"][2]["sources"][0]  # another revision is another model
    assert found["tokenizer"]["tokens"]["<s>"]["source"] == "org/c@v1"
    assert found["tokenizer"]["tokens"]["</s>"]["source"]["model"] == "org/c@v1"
    assert found["tokenizer"]["source"] == "base"
    (found,) = models(SLICES, "org/b@main+org/l=./whole", "org/a+org/l=./merged")
    assert [s["model"] for s in found["slices"][2]["sources"]] == ["./whole", "./merged"]
    assert found["x-source"] == data["x-source"]


WRONG_MODELS = {
    "several": (
        SLICES,
        ["./mine"],
        "the recipe has 4 models",
        "OLD=NEW",
        "org/a, org/b, org/b@main+org/l, org/a+org/l",
    ),
    "unknown": (SLICES, ["org/x=./mine"], "the recipe has no model 'org/x'", "org/a | org/b"),
    "misspelt": (ONE, ["orga=./mine"], "the recipe has no model 'orga'", "did you mean 'org/a'?"),
    "two for one": (ONE, ["./b", "./c"], "one model cannot be several"),
    "nothing": (ONE, ["org/a="], "no model", "org/a=a folder"),
    "a document": (TWO, ["first=./mine"], "the recipe has no model 'first'"),
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_wrong_models(name):
    text, changes, *fragments = WRONG_MODELS[name]
    with pytest.raises(RecipeError) as caught:
        models(text, *changes)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


def test_a_folder_may_have_an_equals_sign(tmp_path):
    folder = tmp_path / "lr=3"
    folder.mkdir()
    assert models(ONE, str(folder))[0]["base_model"] == str(folder)
