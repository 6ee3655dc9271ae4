"""Settings of parameters: reading, checking, and their values for a tensor."""

from __future__ import annotations

import pytest

from deus_merge.core.errors import RecipeError
from deus_merge.core.located import locate
from deus_merge.core.parameters import Parameter
from deus_merge.recipe.parameters import (
    Filtered,
    Gradient,
    Setting,
    check_setting,
    evaluate,
    filters,
    read_settings,
    resolve_setting,
)

NUMBER = Parameter("t", "number", 0.25, "", minimum=0, maximum=1)


def read(value: object) -> Setting:
    return read_settings(locate({"t": value}, "parameters"))["t"]


def test_kinds_of_values():
    assert read(0.5).value == 0.5 and read("word").value == "word" and read(None).value is None
    assert read([0, "1e-1", 1]).value == Gradient((0, 0.1, 1))
    assert read(["o", "down"]).value == ["o", "down"]
    assert read([{"filter": "mlp", "value": [0, 1]}, {"filter": "*", "value": 2}]).value == Filtered(
        (("mlp", Gradient((0, 1))), (None, 2))
    )
    assert read({"a": [1, 2]}).value == {"a": [1, 2]}
    assert read_settings(None) == {} and read_settings(locate(None)) == {}


def test_settings_compare_without_their_places():
    assert read(1) == Setting(1) and read(1) != Setting(2)
    assert read(1).place.where == "parameters.t"


@pytest.mark.parametrize("value", [[1, "word"], [1, {"value": 2}], [{"filter": "q"}], [{"filter": 1, "value": 1}]])
def test_lists_that_mix_kinds(value):
    with pytest.raises(RecipeError):
        read(value)


def test_checks_reach_nested_values():
    check_setting(NUMBER, read([{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]))
    with pytest.raises(RecipeError) as caught:
        check_setting(NUMBER, read([{"filter": "mlp", "value": [0, 1]}, {"value": 2}]))
    assert caught.value.where == "parameters.t[1].value"
    with pytest.raises(RecipeError):
        check_setting(NUMBER, read([{"filter": "mlp", "value": [0, 3]}, {"value": 1}]))


@pytest.mark.parametrize("kind", ["boolean", "integer", "choice"])
def test_gradients_are_for_numbers(kind):
    parameter = Parameter("t", kind, 0, "", choices=("a",))
    with pytest.raises(RecipeError, match="takes no gradient"):
        check_setting(parameter, read([0, 1]))


def test_gradients_of_other_kinds_are_read_number_by_number():
    other = Parameter("t", "other", 0, "", parse=lambda value: value)
    check_setting(other, read([0, 1]))


def test_filters_do_not_apply_to_whole_layers():
    layer = Parameter("t", "number", 0, "", scope="block")
    check_setting(layer, read([0, 1]))
    with pytest.raises(RecipeError, match="takes no filters"):
        check_setting(layer, read([{"value": 1}]))


def test_every_filter_is_found():
    nested = [{"filter": "mlp", "value": [{"filter": "up", "value": 1}, {"value": 2}]}, {"value": 3}]
    assert list(filters(read(nested).value)) == ["mlp", "up"]
    assert list(filters([1, 2])) == []


def test_values_of_a_tensor():
    value = Filtered((("mlp", Gradient((0, 1))), ("q", 5), (None, 7)))
    assert evaluate(value, "mlp.up", 0.25) == 0.25
    assert evaluate(value, "q", 0) == 5
    assert evaluate(value, "other", 0) == 7
    assert evaluate(value, None, 0) == 7  # a whole block has no name: only an entry without a filter applies
    assert evaluate(Filtered((("mlp", 1),)), None, 0) is None


def test_levels_take_precedence_in_their_order():
    some = {"t": read([{"filter": "mlp", "value": 0.75}])}
    all_tensors = {"t": read(1)}
    assert resolve_setting(NUMBER, [some, all_tensors], "mlp.up", 0) == 0.75
    assert resolve_setting(NUMBER, [some, all_tensors], "norm", 0) == 1  # no filter matches: the next level
    assert resolve_setting(NUMBER, [{}, some], "norm", 0) == 0.25  # the default
    assert resolve_setting(NUMBER, [{"t": read("1e-1")}], "norm", 0) == 0.1  # read as the parameter reads it


def test_a_value_that_is_wrong_between_the_ends_of_a_gradient():
    even = Parameter("t", "other", 0, "", parse=_only_ends)
    setting = read([0, 1])
    check_setting(even, setting)
    with pytest.raises(RecipeError, match="not a value of t") as caught:
        resolve_setting(even, [{"t": setting}], "norm", 0.5)
    assert caught.value.where == "parameters.t" and caught.value.got == 0.5


def _only_ends(value: object) -> object:
    """0 or 1"""
    if value in (0, 1):
        return value
    raise ValueError(_only_ends.__doc__)
