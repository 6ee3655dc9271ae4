"""The JSON Schema of recipes: what the reader accepts is valid, and nearly everything that it refuses is not."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator
from test_recipe import SLICES, TOKENIZER, UPSCALES

from deus_merge.core.errors import RecipeError
from deus_merge.core.located import locate
from deus_merge.core.yaml_text import parse, parse_documents
from deus_merge.methods.registry import methods
from deus_merge.models.reference import ModelRef
from deus_merge.recipe.presets import PRESETS, expand
from deus_merge.recipe.reader import TOP, parse_recipe, recipe_from
from deus_merge.recipe.schema import recipe_schema
from deus_merge.recipe.schema_values import OTHER, plain

ROOT = Path(__file__).parents[2]
SCHEMA = recipe_schema()
VALIDATOR = Draft7Validator(SCHEMA)


def problems(document: object) -> list[str]:
    return [f"{list(error.absolute_path)}: {error.message[:200]}" for error in VALIDATOR.iter_errors(document)]


def read(document) -> None:
    """Read a document as far as that is possible without a model; of four layers where the depth matters."""
    recipe = recipe_from(document)
    if recipe.upscale:
        expand(recipe.upscale, ModelRef("base"), 4)


def test_the_file_is_up_to_date_and_a_schema():
    page = runpy.run_path(str(ROOT / "docs/make_recipe_schema.py"))
    assert page["PAGE"].read_text(encoding="utf-8") == page["render"](), "run: python docs/make_recipe_schema.py"
    Draft7Validator.check_schema(SCHEMA)


def test_it_knows_every_key_method_preset_and_parameter():
    assert list(SCHEMA["properties"]) == list(TOP)
    assert [key for key in TOP if SCHEMA["properties"][key] == {}] == []
    assert SCHEMA["properties"]["merge_method"]["enum"] == sorted(methods())
    assert SCHEMA["properties"]["upscale"]["properties"]["preset"]["enum"] == list(PRESETS)
    for name, method in methods().items():
        assert set(SCHEMA["definitions"][f"{name}: parameters"]["properties"]) == {p.name for p in method.parameters}
        assert all(plain(p) for p in method.parameters), "a parameter of a kind that OTHER does not know"
    used = {p.expected for m in methods().values() for p in m.parameters if p.parse is not None}
    assert set(OTHER) <= used


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yml")), ids=lambda p: p.stem)
def test_recipes_are_valid(path):
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        assert problems(document) == []


PARITY = runpy.run_path(str(ROOT / "tests/parity/cases.py"))


class _Names(dict):
    def __missing__(self, name: str) -> str:
        return f"org/{name}"


@pytest.mark.parametrize("case", [*PARITY["EQUAL"], *PARITY["TOKENIZERS"]])
def test_mergekit_recipes_are_valid(case):
    """Those that the parity tests run. Of a key of any name, the schema does not see that it holds anchors."""
    text = {**PARITY["EQUAL"], **PARITY["TOKENIZERS"]}[case].format_map(_Names())
    found = problems(parse(text).plain())
    assert len(found) == (case == "anchors") and all("'common'" in problem for problem in found), found


# What only the models, or an order, can tell: rows of the table of wrong input that are valid by the schema.
BEYOND = {
    "after twice": "each layer once",
    "after the last": "the depth",
    "after the end": "the depth",
    "every 9": "the depth",
    "insert behind the last": "the depth",
    "too many": "the depth",
    "solar odd": "the depth",
    "stack part": "the depth",
    "reversed": "the order of two numbers",
    "unequal": "two ranges",
    "infinity": "the size of a number",
    "slerp of one": "the number of models, which base_model counts to",
}
WRONG = runpy.run_path(str(ROOT / "tests/cli/test_bad_input.py"))["RECIPES"]


def test_wrong_recipes_are_not_valid():
    """Each row of the table that the reader refuses, and whose YAML is right."""
    refused, valid = [], set()
    for name, (text, *_) in WRONG.items():
        if not isinstance(text, str) or len(text) > 10_000:
            continue
        try:
            documents = parse_documents(text)
        except RecipeError:
            continue
        wrong = False
        for document in documents:
            try:
                read(document)
            except RecipeError:
                wrong = True
        if wrong:
            refused.append(name)
            if not any(problems(document.plain()) for document in documents):
                valid.add(name)
    assert len(refused) > 80
    assert valid == set(BEYOND)


@settings(deadline=None)
@given(SLICES, st.none() | TOKENIZER)
def test_generated_recipes_are_valid(data, tokenizer):
    if tokenizer is not None:
        data = {key: value for key, value in data.items() if key != "tokenizer_source"} | {"tokenizer": tokenizer}
    parse_recipe(yaml.safe_dump(data))
    assert problems(data) == []


JUNK = st.sampled_from(
    [None, True, False, 0, 1, 3, -1, 0.5, 2.0, "3", "0.5", "x", "auto", "even", "none", "true", "all", "linear",
     [], {}, [0, 1], ["0", 2.0], [0.1, "1e-3"], ["o"], [0, "x"], {"value": 1}, [{"filter": "mlp", "value": [0, 1]}],
     {"filter": None, "value": "1"}, {"every": "2"}, {"count": 1.0}, {"path": "a", "revision": None},
     {"model": "a", "lora": {"path": "b"}, "override_architecture": "LlamaForCausalLM"}, "symmetry", "org/model",
     {"alignment": "symmetry", "reg": "auto"}, "float16", "torch.float32", [{"model": "a"}], {"kind": "zero"}]
)  # fmt: skip
KEYS = st.sampled_from(
    [*TOP, "sources", "model", "layer_range", "preset", "insert", "t", "weight", "reg", "scale", "x-y"]
)


def places(node):
    """Every place of a value in a document: what holds it, and the key there."""
    if isinstance(node, dict | list):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            yield node, key
            yield from places(node[key])


@st.composite
def changed(draw):
    """A recipe with some values replaced, and some added."""
    data = json.loads(json.dumps(draw(SLICES | UPSCALES)))
    for _ in range(draw(st.integers(1, 3))):
        node, key = draw(st.sampled_from(list(places(data))))
        if isinstance(node, dict) and draw(st.booleans()):
            key = draw(KEYS)
        node[key] = json.loads(json.dumps(draw(JUNK)))
    return data


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(changed())
def test_whatever_the_reader_accepts_is_valid(data):
    try:
        read(locate(data))
    except RecipeError:
        return
    assert problems(data) == [], data
