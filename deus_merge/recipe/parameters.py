"""Parameter values as recipes set them: plain, gradients over layers, filters by tensor name; and how they resolve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import nearest
from ..core.located import Located
from ..core.parameters import Parameter, as_number


@dataclass(frozen=True)
class Gradient:
    """A list of numbers spread over a slice's layers and interpolated linearly."""

    values: tuple[float, ...]

    def at(self, position: float) -> float:
        """The value at ``position`` in [0, 1]."""
        scaled = position * (len(self.values) - 1)
        low = int(scaled)
        high = min(low + 1, len(self.values) - 1)
        return self.values[low] + (scaled - low) * (self.values[high] - self.values[low])


@dataclass(frozen=True)
class Filtered:
    """A value per tensor: the first entry whose filter is part of the tensor's name wins; None matches all."""

    entries: tuple[tuple[str | None, object], ...]


Setting = object  # a plain value, a Gradient or a Filtered
Settings = Mapping[str, tuple[Setting, Located]]


def read_settings(node: Located | None) -> dict[str, tuple[Setting, Located]]:
    """A ``parameters`` section. Raises RecipeError where it is none."""
    if node is None or node.value is None:
        return {}
    return {name: (_setting(item), item) for name, item in node.mapping(what="a mapping of parameters").items()}


def _setting(node: Located) -> Setting:
    if not isinstance(node.value, tuple):
        return node.plain()
    items = node.sequence("a value, a gradient or a list of filters")
    if all(isinstance(i.value, dict) for i in items):
        return Filtered(tuple(_filter(item) for item in items))
    numbers = [as_number(i.value) for i in items]
    if None not in numbers:
        return Gradient(tuple(numbers))
    if any(isinstance(i.value, dict | tuple) for i in items):
        node.fail("mixed list", expected="a list of numbers, or of {filter: ..., value: ...} entries")
    if any(n is not None for n in numbers):
        items[numbers.index(None)].fail("a gradient is a list of numbers", expected="a number")
    return node.plain()


def _filter(node: Located) -> tuple[str | None, Setting]:
    keys = node.mapping(("filter", "value"), "a filter entry")
    if "value" not in keys:
        node.fail("a filter entry needs a value", expected="{filter: part of a tensor name, value: ...}")
    pattern = keys["filter"].plain() if "filter" in keys else None
    if pattern is not None and not isinstance(pattern, str):
        keys["filter"].fail("wrong value", expected="part of a tensor name")
    return (None if pattern == "*" else pattern), _setting(keys["value"])


def check_setting(parameter: Parameter, setting: Setting, place: Located) -> None:
    """Raise a RecipeError unless every value in the setting fits the parameter."""
    if isinstance(setting, Filtered):
        if parameter.scope == "block":
            place.fail(f"{parameter.name} stands for a whole layer: filters do not apply", expected=parameter.expected)
        for entry, (_, value) in zip(place.value, setting.entries, strict=True):
            check_setting(parameter, value, entry.value["value"])
        return
    if isinstance(setting, Gradient) and parameter.kind not in ("number", "other"):
        place.fail(f"{parameter.name} takes no gradient", expected=parameter.expected)
    for value in setting.values if isinstance(setting, Gradient) else (setting,):
        try:
            parameter.read(value)
        except ValueError as error:
            hint = nearest(value, parameter.choices) if isinstance(value, str) else None
            place.fail(f"not a value of {parameter.name}", expected=str(error), hint=hint)


def filters(setting: Setting) -> Iterator[str]:
    """Every filter in a setting, also nested ones."""
    if isinstance(setting, Filtered):
        for pattern, value in setting.entries:
            if pattern is not None:
                yield pattern
            yield from filters(value)


def evaluate(setting: Setting, tensor_name: str | None, position: float) -> object:
    """A setting's plain value for one tensor.

    Args:
        setting: Plain value, Gradient or Filtered.
        tensor_name: The output tensor's name, None for a whole block.
        position: Of the layer in its slice, 0 for the first and 1 for the last.

    Returns:
        The value; None when no filter matches.
    """
    if isinstance(setting, Gradient):
        return setting.at(position)
    if isinstance(setting, Filtered):
        for pattern, value in setting.entries:
            if pattern is None or (tensor_name is not None and pattern in tensor_name):
                return evaluate(value, tensor_name, position)
        return None
    return setting


def resolve_setting(
    parameter: Parameter, levels: Sequence[Settings], tensor_name: str | None, position: float
) -> object:
    """A parameter's value for one tensor: the first of ``levels`` that sets it, or its default.

    Args:
        parameter: Which.
        levels: In order of precedence: source, slice, recipe. A filter list without a match falls through.
        tensor_name, position: See `evaluate`.
    """
    for settings in levels:
        if parameter.name in settings:
            setting, place = settings[parameter.name]
            value = evaluate(setting, tensor_name, position)
            if value is None:
                continue
            try:
                return parameter.read(value)
            except ValueError as error:
                place.fail(f"not a value of {parameter.name}", expected=str(error), got=value)
    return parameter.default
