"""YAML values with places: lines, children, and the values that are refused."""

from __future__ import annotations

import datetime

import pytest
import yaml

from deus_merge.core.errors import RecipeError
from deus_merge.core.located import Located, locate
from deus_merge.core.yaml_text import parse, parse_documents


def test_places_of_values():
    tree = parse("a: 1\nb:\n  - x\n  - {c: [2,\n       3]}\n", "file.yml")
    last = tree.child("b").sequence()[1].child("c").sequence()[1]
    assert (last.value, last.where) == (3, "b[1].c[1] (line 5)")
    assert tree.where == "file.yml (line 1)"
    assert tree.plain() == {"a": 1, "b": ["x", {"c": [2, 3]}]}


def test_documents_without_content_are_left_out():
    documents = parse_documents("---\na: 1\n---\n---\nb: 2\n---\n")
    assert [d.plain() for d in documents] == [{"a": 1}, {"b": 2}]


def test_plain_data_is_located_and_comes_back():
    data = {"a": [1, 2.5, None, True], "b": {"c": "text"}}
    tree = locate(data, "upscale")
    assert tree.plain() == data
    assert tree.child("a").sequence()[1].where == "upscale.a[1]"
    assert locate((1, 2)).plain() == [1, 2]


MERGES = {
    "own keys take precedence": "a: &a {x: 1, y: 2}\nb: {y: 3, <<: *a, z: 4}\n",
    "the first of a list": "a: &a {x: 1}\nb: &b {x: 2, y: 3}\nc: {<<: [*a, *b]}\n",
    "merges of merges": "a: &a {x: 1, y: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: *b, z: 3}\n",
    "a mapping in place": "a: {<<: {x: 1}, y: 2}\n",
    "nothing": "a: {<<: [], y: 2}\nb: {<<: {}, z: 1}\n",
    "at the top": "a: &a {x: 1, y: {z: 2}}\n<<: *a\ny: 5\n",
    "quoted": "a: {'<<': 3}\n",
}


@pytest.mark.parametrize("name", MERGES)
def test_merge_keys_are_those_of_yaml(name):
    assert parse(MERGES[name]).plain() == yaml.safe_load(MERGES[name])


def test_merged_values_have_the_path_of_the_mapping_and_their_own_line():
    tree = parse("a: &a\n  x:\n    - 1\nb:\n  c: {<<: *a}\n")
    assert tree.child("b").child("c").child("x").sequence()[0].where == "b.c.x[0] (line 3)"


def test_shared_values_are_those_that_aliases_elsewhere_refer_to():
    text = "a: [&a {x: 1}]\nb: &b 2\nc: &c [3, &d 4]\ne: {<<: *a}\nf: [*d, *d]\ng: &g 7\nh: [&i 8, *i]\n"
    shared = {key for key, item in parse(text).mapping().items() if item.shared}
    assert shared == {"a", "c", "e", "f"}
    merged = parse("a: &a {x: 1}\n<<: *a\n").mapping()
    assert merged["a"].shared and not merged["x"].shared


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", datetime.date(2020, 1, 1), 1j])
def test_values_that_yaml_cannot_hold_are_refused(value):
    with pytest.raises(RecipeError, match="not a plain value") as caught:
        locate({"a": [value]})
    assert caught.value.where == "a[0]" and caught.value.got == type(value).__name__


def test_values_in_messages_are_short():
    assert locate({"a": [1, None], "b": "x"}).shown() == "{a: [1, nothing], b: 'x'}"
    assert locate({}).shown() == "{}" and locate([]).shown() == "[]"
    assert len(locate(["x" * 1000] * 1000).shown()) == 80


@pytest.mark.parametrize("value", [True, "x", "3.0", "-3", "", 2.5, -1, 0, "0", None])
def test_integers(value):
    assert [Located(v).integer(1) for v in (1, "3", "03", 2.0)] == [1, 3, 3, 2]
    with pytest.raises(RecipeError, match="wrong value"):
        Located(value).integer(1)
