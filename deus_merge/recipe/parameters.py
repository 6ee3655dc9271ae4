"""Parameter settings of recipes: plain values, gradients over layers, filters by tensor name; and their resolution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import nearest
from ..core.located import Located, Plain
from ..core.parameters import Parameter, as_number


@dataclass(frozen=True)
class Gradient:
    """Numbers that are spread over the layers of a slice and interpolated linearly.

    Attributes:
        values: The numbers at equally spaced positions, the first layer's first.
    """

    values: tuple[float, ...]

    def at(self, position: float) -> float:
        """The value at ``position`` in [0, 1]."""
        scaled = position * (len(self.values) - 1)
        low = int(scaled)
        high = min(low + 1, len(self.values) - 1)
        return self.values[low] + (scaled - low) * (self.values[high] - self.values[low])


@dataclass(frozen=True)
class Filtered:
    """Values by tensor name.

    Attributes:
        entries: Filter and value. The first entry whose filter is part of the tensor's name applies; None matches every
            tensor.
    """

    entries: tuple[tuple[str | None, Value], ...]


Value = Plain | Gradient | Filtered


@dataclass(frozen=True)
class Setting:
    """A parameter's value in a recipe.

    Attributes:
        value: The value.
        place: The place in the recipe.
    """

    value: Value
    place: Located = field(compare=False, repr=False, default=Located(None))


Settings = Mapping[str, Setting]


def read_settings(node: Located | None) -> dict[str, Setting]:
    """The settings of a ``parameters`` section; none where there is no section.

    Raises:
        RecipeError: not a mapping, or a list that is neither a gradient nor a list of filters.
    """
    if node is None or node.value is None:
        return {}
    return {name: Setting(_value(item), item) for name, item in node.mapping(kind="a mapping of parameters").items()}


def _value(node: Located) -> Value:
    if isinstance(node.value, dict) and "value" in node.value:  # a single filter
        return Filtered((_filter(node),))
    if not isinstance(node.value, tuple):
        return node.plain()
    items = node.sequence("a value, a gradient or a list of filters")
    if all(isinstance(i.value, dict) for i in items):
        return Filtered(tuple(_filter(item) for item in items))
    numbers = [as_number(i.value) for i in items]
    known = [number for number in numbers if number is not None]
    if len(known) == len(items):
        return Gradient(tuple(known))
    if any(isinstance(i.value, dict | tuple) for i in items):
        node.fail("mixed list", expected="a list of numbers, or of {filter: ..., value: ...} entries")
    if known:
        items[numbers.index(None)].fail("a gradient is a list of numbers", expected="a number")
    return node.plain()


def _filter(node: Located) -> tuple[str | None, Value]:
    keys = node.mapping(("filter", "value"), "a filter entry")
    if "value" not in keys:
        node.fail("a filter entry needs a value", expected="{filter: part of a tensor name, value: ...}")
    pattern = keys["filter"].plain() if "filter" in keys else None
    if pattern is not None and not isinstance(pattern, str):
        keys["filter"].fail("wrong value", expected="part of a tensor name")
    return (None if pattern == "*" else pattern), _value(keys["value"])


def check_setting(parameter: Parameter, setting: Setting) -> None:
    """Raise a RecipeError unless every value of the setting is valid for the parameter."""
    value, place = setting.value, setting.place
    if isinstance(value, Filtered):
        if parameter.scope == "block":
            place.fail(
                f"{parameter.name} applies to a whole layer, so it takes no filters", expected=parameter.expected
            )
        for entry, (_, inner) in zip(_entries(place), value.entries, strict=True):
            check_setting(parameter, Setting(inner, entry.child("value")))
        return
    if isinstance(value, Gradient) and parameter.kind not in ("number", "other"):
        place.fail(f"{parameter.name} takes no gradient", expected=parameter.expected)
    for plain in value.values if isinstance(value, Gradient) else (value,):
        try:
            parameter.read(plain)
        except ValueError as error:
            hint = nearest(plain, parameter.choices) if isinstance(plain, str) else None
            place.fail(f"not a value of {parameter.name}", expected=str(error), hint=hint)


def _entries(place: Located) -> tuple[Located, ...]:
    """The entries of a list of filters, or the single one."""
    return (place,) if isinstance(place.value, dict) else place.sequence()


def filters(value: Value) -> Iterator[str]:
    """Every filter in a value, also nested ones."""
    if isinstance(value, Filtered):
        for pattern, inner in value.entries:
            if pattern is not None:
                yield pattern
            yield from filters(inner)


def evaluate(value: Value, tensor_name: str | None, position: float) -> Plain:
    """The plain value for one tensor.

    Args:
        value: A plain value, gradient or filters.
        tensor_name: The tensor's name; None for a whole block.
        position: The layer's position in its slice, from 0 for the first layer to 1 for the last.

    Returns:
        The plain value; None when no filter matches.
    """
    if isinstance(value, Gradient):
        return value.at(position)
    if isinstance(value, Filtered):
        for pattern, inner in value.entries:
            if pattern is None or (tensor_name is not None and pattern in tensor_name):
                return evaluate(inner, tensor_name, position)
        return None
    return value


def resolve_setting(parameter: Parameter, levels: Sequence[Settings], tensor_name: str | None, position: float) -> Any:
    """A parameter's value for one tensor: that of the first of ``levels`` that sets it, or its default.

    Args:
        parameter: The parameter.
        levels: Settings in order of precedence: source, slice, recipe. Filters without a match leave the value to the
            next level.
        tensor_name, position: See `evaluate`.

    Returns:
        The value as `Parameter.read` gives it, whose type depends on the parameter.

    Raises:
        RecipeError: a gradient's value that is not valid at this position.
    """
    for settings in levels:
        if parameter.name in settings:
            setting = settings[parameter.name]
            value = evaluate(setting.value, tensor_name, position)
            if value is None:
                continue
            try:
                return parameter.read(value)
            except ValueError as error:
                setting.place.fail(f"not a value of {parameter.name}", expected=str(error), got=value)
    return parameter.default
