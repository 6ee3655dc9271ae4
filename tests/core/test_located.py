"""YAML values with places: lines, children, and the values that are refused."""

from __future__ import annotations

import datetime

import pytest

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


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", datetime.date(2020, 1, 1), 1j])
def test_values_that_yaml_cannot_hold_are_refused(value):
    with pytest.raises(RecipeError, match="not a plain value") as caught:
        locate({"a": [value]})
    assert caught.value.where == "a[0]" and caught.value.got == type(value).__name__


def test_values_in_messages_are_short():
    assert locate({"a": [1, None], "b": "x"}).shown() == "{a: [1, nothing], b: 'x'}"
    assert locate({}).shown() == "{}" and locate([]).shown() == "[]"
    assert len(locate(["x" * 1000] * 1000).shown()) == 80


@pytest.mark.parametrize("value", [True, "3", 2.0, -1, 0, None])
def test_integers(value):
    assert Located(1).integer(1) == 1
    with pytest.raises(RecipeError, match="wrong value"):
        Located(value).integer(1)
