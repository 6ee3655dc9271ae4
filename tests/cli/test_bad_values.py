"""Whatever a recipe has anywhere, the answer is a plan or a message."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deus_merge import api
from deus_merge.core.errors import DeusMergeError
from deus_merge.core.located import locate
from deus_merge.core.yaml_text import parse
from deus_merge.recipe.reader import parse_recipe, recipe_from

GOOD = {
    "base_model": "base",
    "dtype": "bfloat16",
    "slices": [
        {"merge_method": "passthrough", "sources": [{"model": "base", "layer_range": [0, 2]}]},
        {
            "merge_method": "slerp",
            "sources": [{"model": "base"}, {"model": "other", "layer_range": [0, 4]}],
            "parameters": {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]},
        },
        {"merge_method": "ot_fuse", "sources": [{"model": "base"}], "parameters": {"reg": 0.1, "zero_init": ["o"]}},
    ],
}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text("ab:{}[]&*!-#\t 01", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
    max_leaves=6,
)


def spots(data, path=()):
    """The path of every value in nested data."""
    yield path
    if isinstance(data, dict | list):
        for key in data if isinstance(data, dict) else range(len(data)):
            yield from spots(data[key], (*path, key))


def put(data, path, value):
    """The data with another value at a path."""
    if not path:
        return value
    new = data.copy()
    new[path[0]] = put(data[path[0]], path[1:], value)
    return new


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(list(spots(GOOD))), ANYTHING)
def test_any_value_anywhere(workshop, monkeypatch, spot, value):
    monkeypatch.chdir(workshop)
    try:
        api.plan(recipe_from(locate(put(GOOD, spot, value))))
    except DeusMergeError as error:
        assert str(error).isascii() and "Located(" not in str(error)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_typing_error(data):
    """A recipe's text with a few characters gone, doubled or put in."""
    text = (
        "base_model: base\nupscale: {preset: opt_deus, insert: {after: [1, 2]}, parameters: {reg: 1e-3, t: [0, 0.5]}}\n"
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(st.text("&*!{}[]:-,#'\"\t\n <?1e.~a\0\u2028", max_size=3)) + text[at + 1 :]
    try:
        parse_recipe(text)
    except DeusMergeError as error:
        assert len(str(error).splitlines()) <= 5


@given(ANYTHING)
def test_values_are_shown_on_one_short_line(value):
    shown = locate(value).shown()
    assert len(shown) <= 80 and len(shown.splitlines()) == 1


def test_values_know_their_lines():
    tree = parse("a: 1\nb:\n  - x\n  - {c: [2,\n       3]}\n")
    assert tree.value["b"].value[1].value["c"].value[1].where == "b[1].c[1] (line 5)"
