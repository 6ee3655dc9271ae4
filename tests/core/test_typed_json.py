"""Dataclasses from JSON and back, and the places that misfits name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, TypedDict

import pytest

from deus_merge.core.text import some_of
from deus_merge.core.typed_json import Misfit, Range, dump, parse


class Color(str, Enum):
    RED = "red"
    BLUE = "blue"


class Note(TypedDict):
    text: str


@dataclass(frozen=True, kw_only=True)
class Leaf:
    size: Annotated[int, Range(1, 9)]
    colors: tuple[Color, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Tree:
    name: str
    leaves: Mapping[str, Leaf]
    notes: tuple[Note, ...] = ()
    order: Sequence[Annotated[int, Range(0)]] | None = None
    alive: bool = True
    more: Any = None


DATA = {
    "name": "oak",
    "leaves": {"a": {"size": 3, "colors": ["blue", "red"]}, "b c": {"size": 1, "weight": 2}},
    "notes": [{"text": "x", "other": [1]}],
    "order": [2, 0],
    "more": {"deep": [None]},
}


def test_there_and_back():
    tree = parse(Tree, DATA | {"unknown": 1})
    assert tree.leaves["a"] == Leaf(size=3, colors=(Color.BLUE, Color.RED)) and tree.order == (2, 0)
    assert tree.notes == ({"text": "x", "other": [1]},) and tree.alive is True
    assert dump(tree) == DATA
    assert dump(parse(Tree, {"name": "oak", "leaves": {}, "alive": False})) == {
        "name": "oak",
        "leaves": {},
        "alive": False,
    }


@pytest.mark.parametrize(
    ("change", "place", "expected", "got"),
    [
        ({"name": None}, "name", "a string", "null"),
        ({"name": 3}, "name", "a string", "3"),
        ({"alive": 1}, "alive", "true or false", "1"),
        ({"leaves": []}, "leaves", "an object", "a list of 0"),
        ({"leaves": {"a": 3}}, "leaves.a", "an object", "3"),
        ({"leaves": {"b c": {}}}, "leaves['b c'].size", "this key", None),
        ({"leaves": {"a": {"size": 0}}}, "leaves.a.size", "a whole number from 1 to 9", "0"),
        ({"leaves": {"a": {"size": 10}}}, "leaves.a.size", "a whole number from 1 to 9", "10"),
        ({"leaves": {"a": {"size": True}}}, "leaves.a.size", "a whole number from 1 to 9", "true"),
        ({"leaves": {"a": {"size": 1, "weight": "1"}}}, "leaves.a.weight", "a number", "'1'"),
        ({"leaves": {"a": {"size": 1, "colors": "red"}}}, "leaves.a.colors", "a list", "'red'"),
        ({"leaves": {"a": {"size": 1, "colors": ["red", "green"]}}}, "leaves.a.colors[1]", "red | blue", "'green'"),
        ({"leaves": {"a": {"size": 1, "colors": [["red"]]}}}, "leaves.a.colors[0]", "red | blue", "a list of 1"),
        ({"notes": [{"text": "x"}, {}]}, "notes[1].text", "this key", None),
        ({"notes": [3]}, "notes[0]", "an object", "3"),
        ({"order": [0, -1]}, "order[1]", "a whole number of at least 0", "-1"),
    ],
)
def test_misfits_name_their_place(change, place, expected, got):
    with pytest.raises(Misfit) as caught:
        parse(Tree, DATA | change)
    assert (caught.value.place, caught.value.expected, caught.value.got) == (place, expected, got)


def test_long_values_and_names_are_cut():
    with pytest.raises(Misfit) as caught:
        parse(Tree, DATA | {"leaves": {"x" * 5000: 3}, "name": "y"})
    assert len(caught.value.place) < 300
    with pytest.raises(Misfit) as caught:
        parse(Tree, DATA | {"leaves": "y" * 5000})
    assert len(caught.value.got or "") < 300


def test_some_of():
    assert some_of([]) == "" and some_of("abc") == "a, b, c"
    assert some_of(range(5)) == "0, 1, 2, 3, 4" and some_of(range(6)) == "0, 1, 2, 3, 4 and 1 more"
    assert some_of(range(9), 2) == "0, 1 and 7 more"
